"""Properties of folders as a source: the stream, the split, captions, what is set aside, and how pictures are prepared."""

import json
import os
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.config import Config
from mezzotint.data.batch import Batch, Loader
from mezzotint.data.folder import Folder, FolderConfig
from mezzotint.errors import UserError

SIDE = 8


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where refusals leave their lists, instead of the system's folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def paint(path: Path, seed: int) -> None:
    """A picture of coloured noise, different for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def fill(folder: Path, count: int) -> None:
    for seed in range(count):
        paint(folder / f"{seed:03}.png", seed)


def build(folder: Path, size: int = SIDE, held_out: float = 0.3, max_bad: float = 0.1, flip: bool = False, seed: int = 0) -> Folder:
    return FolderConfig(str(folder), size, held_out, max_bad, flip, seed).build()


def training_ids(folder: Folder) -> set[str]:
    return set(folder.batch(0, len(folder)).ids)


def held_out_ids(folder: Folder) -> set[str]:
    return set(folder.held_out(10**6).ids)


def captions(folder: Folder) -> dict[str, tuple[str, ...]]:
    return dict(zip(folder.ids, folder.captions, strict=True))


def equal(one: Batch, other: Batch) -> bool:
    return one.ids == other.ids and one.prompts == other.prompts and torch.equal(one.images, other.images)


def only_picture(folder: Path, size: int) -> torch.Tensor:
    """The only image of a folder, (3, size, size), 0..255."""
    source = build(folder, size)
    assert len(source) == 1
    return source.batch(0, 1).images[0].add(1).mul(127.5).round()


# The stream.


def test_every_image_comes_exactly_once_per_epoch_across_batches(images: Path) -> None:
    fill(images, 30)
    source = build(images)
    size = len(source) - 5  # batches cross the borders of epochs
    stream = [name for number in range(len(source)) for name in source.batch(number, size).ids]
    epochs = [stream[i : i + len(source)] for i in range(0, len(stream), len(source))]
    assert len(epochs) == size
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == len(source) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_stream_does_not_depend_on_how_it_is_cut_into_batches(images: Path) -> None:
    fill(images, 12)
    for seed in range(12):
        (images / f"{seed:03}.txt").write_text("one\ntwo\nthree")
    source = build(images, flip=True)
    whole = source.batch(0, 60)  # larger than several epochs
    parts = [source.batch(number, 4) for number in range(15)]
    assert whole.ids == [name for part in parts for name in part.ids]
    assert whole.prompts == [prompt for part in parts for prompt in part.prompts]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_batch_is_a_pure_function_of_its_number_and_size(images: Path) -> None:
    fill(images, 12)
    for seed in range(12):
        (images / f"{seed:03}.txt").write_text("one\ntwo\nthree")
    source = build(images, flip=True)
    forwards = [source.batch(number, 5) for number in range(8)]
    backwards = [build(images, flip=True).batch(number, 5) for number in reversed(range(8))]
    assert all(equal(one, other) for one, other in zip(forwards, reversed(backwards), strict=True))
    assert all(equal(one, source.batch(number, 5)) for number, one in enumerate(forwards))


def test_seed_changes_the_order(images: Path) -> None:
    fill(images, 20)
    assert build(images, seed=1).batch(0, 10).ids != build(images, seed=2).batch(0, 10).ids


def test_batches_are_what_a_source_promises(images: Path) -> None:
    fill(images, 6)
    (images / "000-bad.png").write_bytes(b"")  # must not shift pictures against their names
    source = build(images, max_bad=0.5)
    batch = next(Loader(source, 4))
    assert batch.images.shape == (4, 3, SIDE, SIDE)
    assert batch.images.dtype == torch.float32
    assert len(batch.prompts) == len(batch.ids) == 4
    assert batch.rejected is None
    for picture, name in zip(batch.images, batch.ids, strict=True):
        stored = torch.from_numpy(np.array(Image.open(images / name))).permute(2, 0, 1)
        assert torch.equal(picture, stored / 127.5 - 1)


def test_flip_mirrors_about_half_of_the_training_pictures_and_no_held_out_one(images: Path) -> None:
    fill(images, 10)
    plain, flipping = build(images), build(images, flip=True)
    one, other = plain.batch(0, 400), flipping.batch(0, 400)
    same = [torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True)]
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(one.images, other.images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 150 < sum(mirrored) < 250
    assert equal(plain.held_out(10), flipping.held_out(10))


def test_configuration_survives_storage(images: Path) -> None:
    stored = FolderConfig(str(images), 16, 0.25, 0.5, True, 7)
    assert Config.from_data(json.loads(json.dumps(stored.to_data()))) == stored


# The split.


def test_split_is_complete_and_near_its_share(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(images, 200)
    monkeypatch.setattr("mezzotint.data.folder.CHUNK", 64)
    source = build(images)
    training, held_out = training_ids(source), held_out_ids(source)
    assert training | held_out == {f"{seed:03}.png" for seed in range(200)}
    assert not training & held_out
    assert 35 < len(held_out) < 85
    assert len(source) == len(training)


def test_split_does_not_change_when_files_are_added_removed_or_renamed(images: Path) -> None:
    fill(images, 40)
    held_out = held_out_ids(build(images))
    for seed in range(40, 60):
        paint(images / "new" / f"{seed}.png", seed)
    assert {name for name in held_out_ids(build(images, seed=5)) if not name.startswith("new")} == held_out
    removed = sorted(held_out)[0]
    (images / removed).unlink()
    (images / "020.png").rename(images / "renamed.png")
    expected = {"renamed.png" if name == "020.png" else name for name in held_out - {removed}}
    assert {name for name in held_out_ids(build(images)) if not name.startswith("new")} == expected


def test_copies_fall_on_the_same_side(images: Path) -> None:
    fill(images, 40)
    for seed in range(40):
        with Image.open(images / f"{seed:03}.png") as picture:
            picture.save(images / f"copy-{seed:03}.bmp")  # other bytes, the same pixels
    source = build(images)
    held_out = held_out_ids(source)
    assert 0 < len(held_out) < 80
    assert all((f"{seed:03}.png" in held_out) == (f"copy-{seed:03}.bmp" in held_out) for seed in range(40))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.999])
def test_both_sides_get_a_picture_whatever_the_share(images: Path, count: int, share: float) -> None:
    fill(images, count)
    source = build(images, held_out=share)
    assert len(source) >= 1
    assert len(source.held_out(count)) >= 1
    assert len(source) == (1 if share == 0.999 else count - 1)


def test_a_single_picture_with_copies_is_trained_on(images: Path) -> None:
    paint(images / "a.png", 1)
    paint(images / "b.png", 1)
    source = build(images, held_out=0.999)
    assert len(source) == 2
    assert len(source.held_out(4)) == 0
    assert source.held_out(4).images.shape == (0, 3, SIDE, SIDE)


def test_held_out_has_a_fixed_order(images: Path) -> None:
    fill(images, 40)
    many, few = build(images, held_out=0.5).held_out(10), build(images, held_out=0.5, seed=3).held_out(4)
    assert len(many) == 10
    assert many.ids[:4] == few.ids
    for seed in range(40):
        (images / f"{seed:03}.png").rename(images / f"renamed-{40 - seed:02}.png")
    assert torch.equal(build(images, held_out=0.5).held_out(4).images, few.images)


# Captions.


def test_json_lines_give_captions(images: Path) -> None:
    fill(images, 2)
    paint(images / "sub" / "deep.png", 2)
    rows = [{"file_name": "000.png", "text": "a\u2028b", "tags": ["x"]}, {"file_name": "./sub/deep.png", "text": " déjà 🎈 "}]
    (images / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    assert captions(build(images)) == {"000.png": ("a\u2028b",), "001.png": (), "sub/deep.png": ("déjà 🎈",)}


def test_csv_gives_captions(images: Path) -> None:
    fill(images, 3)
    text = 'tag,file_name,text\r\nx,000.png,"a cat, sitting"\r\n\r\ny,001.png,"two\nlines"\r\nz,002.png, "a ""quote"""\r\n'
    (images / "metadata.csv").write_text(text, encoding="utf-8-sig", newline="")
    assert captions(build(images)) == {"000.png": ("a cat, sitting",), "001.png": ("two\nlines",), "002.png": ('a "quote"',)}


def test_sidecars_give_variants(images: Path) -> None:
    paint(images / "sub" / "a.png", 0)
    (images / "sub" / "a.txt").write_text("one\r\n\n  two \n\n", encoding="utf-8-sig")
    assert captions(build(images)) == {"sub/a.png": ("one", "two")}


def test_metadata_wins_and_sidecars_fill_in(images: Path) -> None:
    fill(images, 3)
    for seed in range(3):
        (images / f"{seed:03}.txt").write_text("sidecar")
    (images / "metadata.csv").write_text("file_name,text\n000.png,row\n001.png,\n")
    assert captions(build(images)) == {"000.png": ("row",), "001.png": ("sidecar",), "002.png": ("sidecar",)}


def test_rows_of_the_same_image_are_variants(images: Path) -> None:
    fill(images, 1)
    (images / "metadata.csv").write_text("file_name,text\n000.png,one\n000.png,two\n")
    assert captions(build(images)) == {"000.png": ("one", "two")}


def test_every_variant_is_used_and_the_first_one_is_held_out(images: Path) -> None:
    fill(images, 10)
    for seed in range(10):
        (images / f"{seed:03}.txt").write_text(f"{seed} one\n{seed} two\n{seed} three")
    source = build(images)
    batch = source.batch(0, 90 * len(source))
    assert all(prompt.startswith(f"{int(name[:3])} ") for prompt, name in zip(batch.prompts, batch.ids, strict=True))
    used = Counter(batch.prompts)
    assert len(used) == 3 * len(source)
    assert min(used.values()) > 10
    held_out = source.held_out(10)
    assert held_out.prompts == [f"{int(name[:3])} one" for name in held_out.ids]


def test_images_without_a_caption_are_kept_and_counted(images: Path) -> None:
    fill(images, 5)
    (images / "000.txt").write_text("a caption")
    (images / "001.txt").write_text(" \n")
    source = build(images)
    prompts = source.batch(0, len(source)).prompts + source.held_out(5).prompts
    assert sorted(prompts) == ["", "", "", "", "a caption"]
    assert source.bad == []
    assert "4 without a caption" in source.report()


def test_images_that_metadata_names_need_no_known_ending(images: Path) -> None:
    paint(images / "0001", 0)
    (images / "metadata.csv").write_text("file_name,text\n0001,a caption\n")
    assert captions(build(images)) == {"0001": ("a caption",)}


# What is set aside.


def png(width: int, height: int) -> bytes:
    """A PNG that states its size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated_jpeg(images: Path) -> None:
    paint(images / "whole.png", 99)
    Image.open(images / "whole.png").resize((200, 200)).save(images / "bad.jpg")
    (images / "whole.png").unlink()
    (images / "bad.jpg").write_bytes((images / "bad.jpg").read_bytes()[:-900])


def truncated_png(images: Path) -> None:
    paint(images / "bad.png", 99)
    (images / "bad.png").write_bytes((images / "bad.png").read_bytes()[:150])


def floating_point(images: Path) -> None:
    Image.new("F", (SIDE, SIDE)).save(images / "bad.tif")


def thirty_two_bits(images: Path) -> None:
    Image.new("I", (SIDE, SIDE), 1 << 20).save(images / "bad.tif")


def writes(file: str, content: bytes) -> Callable[[Path], None]:
    def write(images: Path) -> None:
        (images / file).write_bytes(content)

    return write


def link_out(images: Path) -> None:
    paint(images.parent / "outside.png", 99)
    (images / "bad.png").symlink_to(images.parent / "outside.png")


def linked_folder(images: Path) -> None:
    paint(images.parent / "other" / "outside.png", 99)
    (images / "sub").symlink_to(images.parent / "other")


def broken_link(images: Path) -> None:
    (images / "bad.png").symlink_to(images / "nothing.png")


def pipe(images: Path) -> None:
    os.mkfifo(images / "bad.png")  # opening it would wait for ever


def sidecar(content: bytes) -> Callable[[Path], None]:
    def write(images: Path) -> None:
        paint(images / "bad.png", 99)
        (images / "bad.txt").write_bytes(content)

    return write


def sidecar_link_out(images: Path) -> None:
    paint(images / "bad.png", 99)
    (images.parent / "secret.txt").write_text("a secret")
    (images / "bad.txt").symlink_to(images.parent / "secret.txt")


def rows(*lines: bytes, file: str = "metadata.jsonl") -> Callable[[Path], None]:
    def write(images: Path) -> None:
        paint(images.parent / "outside.png", 99)
        (images / file).write_bytes(b"\n".join(lines))

    return write


def row_through_link(images: Path) -> None:
    (images / ".link").symlink_to(images.parent)
    rows(b'{"file_name": ".link/outside.png", "text": "x"}')(images)


def row_absolute(images: Path) -> None:
    rows(json.dumps({"file_name": str(images / "000.png"), "text": "x"}).encode())(images)


GOOD = b'{"file_name": "000.png", "text": "fine"}'
HEADER = b"file_name,text"
BAD = {
    "empty": (writes("bad.png", b""), "bad.png", "empty file"),
    "text": (writes("bad.png", b"not a picture at all"), "bad.png", "not an image"),
    "unsupported": (writes("bad.heic", b"\0\0\0\x18ftypheic"), "bad.heic", "not an image"),
    "another format": (writes("bad.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), "bad.png", "not an image"),
    "truncated JPEG": (truncated_jpeg, "bad.jpg", "cannot be decoded: .*truncated"),
    "truncated PNG": (truncated_png, "bad.png", "cannot be decoded"),
    "floats": (floating_point, "bad.tif", "cannot be decoded: floating-point"),
    "32 bits": (thirty_two_bits, "bad.tif", "cannot be decoded: 32-bit"),
    "81 megapixels": (writes("bad.png", png(9000, 9000)), "bad.png", "too large: more than 64 megapixels"),
    "100 megapixels": (writes("bad.png", png(10000, 10000)), "bad.png", "too large: more than 64 megapixels"),
    "2500 megapixels": (writes("bad.png", png(50000, 50000)), "bad.png", "too large: more than 64 megapixels"),
    "link out": (link_out, "bad.png", "a link out of the folder"),
    "linked folder": (linked_folder, "sub", "a link to a folder"),
    "broken link": (broken_link, "bad.png", "not a regular file"),
    "pipe": (pipe, "bad.png", "not a regular file"),
    "sidecar in Latin-1": (sidecar(b"caf\xe9"), "bad.png", "bad caption: 'bad.txt' is not UTF-8"),
    "sidecar link out": (sidecar_link_out, "bad.png", "bad caption: 'bad.txt' is a link out of the folder"),
    "row in Latin-1": (rows(GOOD, b'{"file_name": "001.png", "text": "caf\xe9"}'), "001.png", "bad caption: metadata.jsonl:2 is not UTF-8"),
    "row with half a pair": (rows(b'{"file_name": "001.png", "text": "\\ud800"}'), "001.png", "bad caption: metadata.jsonl:1 is not UTF-8"),
    "row with a list": (rows(b'{"file_name": "001.png", "text": [1]}'), "001.png", "bad caption: metadata.jsonl:1 is not a string"),
    "CSV row in Latin-1": (rows(HEADER, b"001.png,caf\xe9", file="metadata.csv"), "001.png", "bad caption: metadata.csv:2 is not UTF-8"),
    "row without its file": (rows(GOOD, b'{"file_name": "gone.png", "text": "x"}'), "metadata.jsonl:2", "no such file: 'gone.png'"),
    "row with a NUL": (rows(b'{"file_name": "a\\u0000.png", "text": "x"}'), "metadata.jsonl:1", "no such file"),
    "row above the folder": (rows(b'{"file_name": "../outside.png", "text": "x"}'), "metadata.jsonl:1", "path out of the folder"),
    "row with an absolute path": (row_absolute, "metadata.jsonl:1", "path out of the folder"),
    "row through a link": (row_through_link, "metadata.jsonl:1", "path out of the folder"),
    "row without a name": (rows(b'{"text": "x"}', GOOD), "metadata.jsonl:1", "unreadable row: no file_name"),
    "row that is no JSON": (rows(GOOD, b"", b'{"file_name": "001.png", '), "metadata.jsonl:3", "unreadable row: not a JSON object"),
    "row that is too deep": (rows(b"[" * 100_000, GOOD), "metadata.jsonl:1", "unreadable row: not a JSON object"),
    "row that is a list": (rows(b'["001.png", "x"]'), "metadata.jsonl:1", "unreadable row: not a JSON object"),
    "CSV row of three": (rows(HEADER, b"001.png,a cat, sitting", file="metadata.csv"), "metadata.csv:2", "unreadable row: 3 cells"),
    "CSV row of one": (rows(HEADER, b"001.png", b"000.png,x", file="metadata.csv"), "metadata.csv:2", "unreadable row: 1 cells"),
    "CSV row misquoted": (rows(HEADER, b'001.png,"a"b', b"000.png,x", file="metadata.csv"), "metadata.csv:2", "unreadable row"),
}


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_set_aside_with_its_reason(images: Path, kind: str) -> None:
    write, file, reason = BAD[kind]
    fill(images, 6)
    write(images)
    before = snapshot(images)
    source = build(images, max_bad=0.5)
    assert [bad.file for bad in source.bad] == [file]
    assert source.bad[0].reason.startswith(reason.partition(".*")[0])
    assert reason.rpartition(".*")[2] in source.bad[0].reason
    assert source.ids == [f"{seed:03}.png" for seed in range(6) if file != f"{seed:03}.png"]
    assert training_ids(source) | held_out_ids(source) == set(source.ids)
    assert snapshot(images) == before


def test_a_quote_that_is_never_closed_loses_every_row_after_it(images: Path) -> None:
    fill(images, 6)
    (images / "metadata.csv").write_text('file_name,text\n000.png,fine\n001.png,"open\n002.png,lost\n003.png,lost\n')
    source = build(images, max_bad=0.5)
    assert [bad.file for bad in source.bad] == ["metadata.csv:3", "metadata.csv:4", "metadata.csv:5"]
    assert captions(source)["000.png"] == ("fine",)
    assert captions(source)["002.png"] == ()


def test_hidden_files_are_passed_over(images: Path) -> None:
    fill(images, 2)
    (images / "._000.png").write_bytes(b"a resource fork")
    paint(images / ".checkpoints" / "old.png", 9)
    source = build(images)
    assert source.ids == ["000.png", "001.png"]
    assert source.bad == []


def test_links_within_the_folder_are_followed(images: Path) -> None:
    fill(images, 2)
    (images / "again.png").symlink_to(images / "000.png")
    assert build(images).ids == ["000.png", "001.png", "again.png"]


def test_list_of_bad_files_is_written_as_json_lines(images: Path, tmp_path: Path) -> None:
    fill(images, 4)
    (images / "bäd\n.png").write_bytes(b"")
    (images / "worse.png").write_bytes(b"text")
    source = build(images, max_bad=0.5)
    source.write_bad(tmp_path / "bad.jsonl")
    read = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert read == [{"file": bad.file, "reason": bad.reason} for bad in source.bad]
    assert [row["file"] for row in read] == ["bäd\n.png", "worse.png"]


def test_report_counts_everything(images: Path) -> None:
    fill(images, 20)
    for name in ("a", "b"):
        (images / f"{name}.png").write_bytes(b"")
    (images / "c.png").write_bytes(b"text")
    (images / "000.txt").write_text("a caption")
    source = build(images, max_bad=0.5)
    report = source.report()
    held_out = len(source.held_out(20))
    for part in ("20 images", f"{20 - held_out} to train on", f"{held_out} held out", "19 without", "3 set aside"):
        assert part in report
    assert "2 empty file (first: 'a.png')" in report
    assert "1 not an image (first: 'c.png')" in report


# Refusals.


def refusal(make: Callable[[], object]) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_too_many_bad_files_are_refused_with_a_list(images: Path, temporary: Path) -> None:
    fill(images, 6)
    for name in ("x", "y"):
        (images / f"{name}.png").write_bytes(b"")
    message = refusal(lambda: build(images, max_bad=0.2))
    (listing,) = temporary.iterdir()
    for part in ("2 of 8", "'x.png'", "empty file", str(listing), "max_bad above 0.250"):
        assert part in message
    assert [json.loads(line)["file"] for line in listing.read_text().splitlines()] == ["x.png", "y.png"]
    assert len(build(images, max_bad=0.25).ids) == 6


def test_a_folder_with_no_usable_image_is_refused(images: Path) -> None:
    (images / "x\n.png").write_bytes(b"")
    message = refusal(lambda: build(images, max_bad=1.0))
    assert "1 of 1" in message
    assert "max_bad" not in message


def test_paths_that_are_no_folder_of_images_are_refused(images: Path) -> None:
    assert "no folder" in refusal(lambda: build(images / "missing"))
    assert "choose a folder" in refusal(lambda: build(images))
    (images / "notes.txt").write_text("x")
    assert "is a file; give the folder" in refusal(lambda: build(images / "notes.txt"))
    assert "choose a folder" in refusal(lambda: build(images))


def test_two_metadata_files_are_refused(images: Path) -> None:
    fill(images, 2)
    for name in ("metadata.jsonl", "metadata.csv"):
        (images / name).write_text("")
    assert "remove one" in refusal(lambda: build(images))


def test_metadata_outside_the_folder_is_refused(images: Path) -> None:
    fill(images, 2)
    (images.parent / "elsewhere.csv").write_text("file_name,text\n000.png,a secret\n")
    (images / "metadata.csv").symlink_to(images.parent / "elsewhere.csv")
    assert "link out of the folder" in refusal(lambda: build(images))


@pytest.mark.parametrize("fields", [{"size": 0}, {"held_out": 1.0}, {"held_out": -0.1}, {"max_bad": 1.5}, {"max_bad": -1.0}])
def test_impossible_settings_are_refused(images: Path, fields: dict[str, float]) -> None:
    fill(images, 2)
    config = FolderConfig(str(images)).replace(**fields)
    assert refusal(config.build).startswith(next(iter(fields)))


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder of images that the process reads as an ordinary user, which a superuser cannot be kept from."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        folder, user = Path(path), os.geteuid()
        fill(folder, 6)
        paint(folder / "sub" / "006.png", 6)
        (folder / "004.txt").write_text("a caption")
        (folder / "metadata.csv").write_text("file_name,text\n000.png,a caption\n")
        build(folder)  # loads the decoders, which the ordinary user may not be able to read
        folder.chmod(0o755)
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)
        (folder / "sub").chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_what_may_not_be_read_is_reported(guarded: Path) -> None:
    def chmod(path: Path, mode: int) -> None:  # as the owner, although the images are read as somebody else
        user = os.geteuid()
        os.seteuid(os.getuid())
        path.chmod(mode)
        os.seteuid(user)

    chmod(guarded / "003.png", 0)
    chmod(guarded / "004.txt", 0)
    chmod(guarded / "sub", 0)
    assert [(bad.file, bad.reason) for bad in build(guarded, max_bad=0.5).bad] == [
        ("sub", "folder cannot be listed: Permission denied"),
        ("003.png", "no permission to read"),
        ("004.png", "bad caption: '004.txt' cannot be read, Permission denied"),
    ]
    chmod(guarded / "metadata.csv", 0)
    assert "metadata.csv'; allow it or remove the file" in refusal(lambda: build(guarded))
    chmod(guarded, 0)
    assert "no permission to read the folder" in refusal(lambda: build(guarded))


# From files to pixels.


def test_transparent_pixels_become_white(images: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.paste((200, 0, 100, 255), (0, 0, 2, 4))
    picture.paste((0, 0, 0, 128), (0, 0, 1, 4))
    picture.save(images / "a.png")
    pixels = only_picture(images, 4)
    assert pixels[:, 0, 0].tolist() == pytest.approx([127] * 3, abs=1)
    assert pixels[:, 0, 1].tolist() == [200, 0, 100]
    assert pixels[:, 0, 2:].unique().tolist() == [255]


def transparent_palette() -> Image.Image:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 200, 0, 100])
    picture.paste(1, (0, 0, 2, 4))
    picture.info["transparency"] = 0
    return picture


def transparent_grey() -> Image.Image:
    picture = Image.new("LA", (4, 4), (0, 0))
    picture.paste((90, 255), (0, 0, 2, 4))
    return picture


def deep_grey() -> Image.Image:
    picture = Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16))
    picture.paste(257 * 90, (0, 0, 2, 4))
    picture.info["transparency"] = 1000
    return picture


def cmyk() -> Image.Image:
    picture = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    picture.paste((0, 255, 0, 0), (0, 0, 2, 4))
    return picture


def bilevel() -> Image.Image:
    picture = Image.new("1", (4, 4), 1)
    picture.paste(0, (0, 0, 2, 4))
    return picture


@pytest.mark.parametrize(
    ("picture", "ending", "left"),
    [
        (transparent_palette, "png", [200, 0, 100]),
        (transparent_palette, "gif", [200, 0, 100]),
        (transparent_grey, "png", [90, 90, 90]),
        (deep_grey, "png", [90, 90, 90]),
        (cmyk, "tif", [255, 0, 255]),
        (bilevel, "png", [0, 0, 0]),
    ],
)
def test_every_mode_becomes_rgb(images: Path, picture: Callable[[], Image.Image], ending: str, left: list[int]) -> None:
    drawn = picture()
    drawn.save(images / f"a.{ending}", **({"transparency": drawn.info["transparency"]} if "transparency" in drawn.info else {}))
    pixels = only_picture(images, 4)
    assert pixels[:, 0, 0].tolist() == left
    assert pixels[:, 0, 2:].unique().tolist() == [255]


@pytest.mark.parametrize(("width", "height"), [(40, 16), (16, 40)])
def test_the_middle_is_kept(images: Path, width: int, height: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "a.png")
    top, left = (height - 16) // 2, (width - 16) // 2
    middle = torch.from_numpy(noise[top : top + 16, left : left + 16]).permute(2, 0, 1)
    assert torch.equal(only_picture(images, 16), middle.float())
    halved = np.array(Image.fromarray(noise).resize((width // 2, height // 2), Image.Resampling.LANCZOS))
    middle = torch.from_numpy(halved[top // 2 : top // 2 + 8, left // 2 : left // 2 + 8]).permute(2, 0, 1)
    assert only_picture(images, 8).sub(middle).abs().max() <= 1


def test_the_longest_picture_costs_no_more_than_its_square(images: Path) -> None:
    Image.new("RGB", (60_000, 1), "blue").save(images / "a.png")
    assert only_picture(images, 64)[2].unique().tolist() == [255]


def test_shrinking_is_antialiased(images: Path) -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(images / "a.png")
    assert only_picture(images, 8).sub(127.5).abs().max() < 3


def test_pictures_are_turned_upright(images: Path) -> None:
    picture = Image.new("RGB", (4, 4), "white")
    picture.paste("black", (0, 0, 4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored top row is the right-hand side
    picture.save(images / "a.png", exif=exif)
    pixels = only_picture(images, 4)
    assert pixels[:, :, 2:].unique().tolist() == [0]
    assert pixels[:, :, :2].unique().tolist() == [255]


def test_a_wrong_ending_does_no_harm(images: Path) -> None:
    Image.new("RGB", (4, 4), "white").save(images / "A.PNG", format="JPEG")
    assert only_picture(images, 4).unique().tolist() == [255]


def test_many_images_print_nothing_where_nobody_watches(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(images, 210)
    build(images)
    assert capfd.readouterr() == ("", "")
