"""What a folder sets aside, what it refuses, and what it says of both."""

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import SIDE, build, captions, fill, held_out_ids, paint, training_ids
from PIL import Image

from mezzotint.data.folder import FolderConfig
from mezzotint.data.survey import write_bad
from mezzotint.errors import UserError

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
    write_bad(source.bad, tmp_path / "bad.jsonl")
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
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of images that the process reads as an ordinary user, which a superuser cannot be kept from."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path, tempfile.TemporaryDirectory(dir="/tmp") as cache:
        folder, user = Path(path), os.geteuid()
        Path(cache).chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", f"{cache}/{user}")
        fill(folder, 6)
        paint(folder / "sub" / "006.png", 6)
        (folder / "004.txt").write_text("a caption")
        (folder / "metadata.csv").write_text("file_name,text\n000.png,a caption\n")
        build(folder)  # loads the decoders, which the ordinary user may not be able to read
        folder.chmod(0o755)
        if user == 0:
            os.seteuid(65534)
            monkeypatch.setenv("XDG_CACHE_HOME", f"{cache}/ordinary")
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
