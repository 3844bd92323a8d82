"""Properties of folders as a source: the stream, the split, captions, and how pictures are prepared."""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import SIDE, build, captions, equal, fill, held_out_ids, only_picture, paint, training_ids
from PIL import Image

from mezzotint.config import Config
from mezzotint.data.batch import Loader
from mezzotint.data.folder import FolderConfig
from mezzotint.data.table import Table

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


def test_the_version_is_that_of_pictures_and_captions(images: Path) -> None:
    fill(images, 4)
    versions = [build(images).version, build(images, seed=1).version]
    (images / "000.txt").write_text("another caption")
    versions.append(build(images).version)
    fill(images, 5)
    versions.append(build(images).version)
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3


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


# The cache.


def test_a_folder_is_read_once_as_long_as_no_file_changes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    create = Table.create

    def watched(path: Path, rows: Iterable[Any]) -> Table:
        made.append(path)
        return create(path, rows)

    monkeypatch.setattr(Table, "create", watched)
    fill(images, 4)
    before = build(images)
    assert equal(build(images, size=4, flip=True, held_out=0.6).batch(0, 1), build(images, size=4, flip=True, held_out=0.6).batch(0, 1))
    assert len(made) == 1
    changes = [lambda: paint(images / "000.png", 9), lambda: (images / "001.txt").write_text("a caption"), (images / "003.png").unlink]
    for number, change in enumerate(changes, start=2):
        change()
        assert build(images).version != before.version
        assert len(made) == number


def test_a_table_goes_when_another_takes_its_place_and_nobody_reads_it(images: Path) -> None:
    fill(images, 3)
    read = build(images)
    place = read.rows.table.path
    tables = lambda: {path.name for path in place.parent.glob("*.lance")}  # noqa: E731
    paint(images / "000.png", 9)
    newer = build(images).rows.table.path
    assert tables() == {place.name, newer.name}
    assert len(read.batch(0, 2)) == 2
    del read
    gc.collect()
    paint(images / "000.png", 8)
    newest = build(images).rows.table.path
    assert tables() == {newest.name}


def test_a_large_folder_is_read_when_it_is_asked_for(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(images, 20)
    (images / "000.txt").write_text("a caption")
    truncated = (images / "007.png").read_bytes()[:150]
    (images / "007.png").write_bytes(truncated)
    (images / "008.png").write_bytes(b"")
    kept = build(images)
    monkeypatch.setattr("mezzotint.data.folder.MEMORY", 0)
    read = build(images)
    assert [bad.file for bad in read.bad] == ["008.png"]
    with pytest.warns(UserWarning, match="'007.png' .* is set aside"):
        names, held_out = training_ids(read) | set(read.batch(1, len(read)).ids), held_out_ids(read)
    assert names | held_out == set(kept.ids)
    assert not names & held_out
    assert [bad.file for bad in read.bad] == ["008.png", "007.png"]
    assert captions(read)["000.png"] == ("a caption",)
    assert equal(read.batch(0, 9), build(images).batch(0, 9))
