"""What is read of a header is what Pillow says of it, and nothing that is fed to it does harm."""

import io
import random
from pathlib import Path

import pytest
from heaps import drawn, encoded, moving, mp4, turned, webm
from PIL import Image

from mezzotint.data import header as headers
from mezzotint.data.decode import UnusableError, decode
from mezzotint.data.header import Header, header, moves, scan
from mezzotint.data.survey import Bad

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
PICTURES = {
    "png": encoded(drawn()),
    "png, palette": encoded(drawn(mode="P")),
    "png, 16 bits": encoded(drawn(mode="I;16")),
    "png, turned": encoded(drawn(), exif=turned(6)),
    "jpeg": encoded(drawn(), "JPEG"),
    "jpeg, progressive": encoded(drawn(), "JPEG", progressive=True),
    "jpeg, CMYK": encoded(drawn(mode="CMYK"), "JPEG"),
    "jpeg, upside down": encoded(drawn(), "JPEG", exif=turned(3)),
    "jpeg, on its side": encoded(drawn(), "JPEG", exif=turned(8, "(c) somebody")),
    "jpeg, turned by XMP": encoded(drawn(), "JPEG", xmp=XMP),
    "jpeg, a long comment": encoded(drawn(), "JPEG", comment=bytes(60_000), icc_profile=bytes(100_000)),
    "webp": encoded(drawn(), "WEBP"),
    "webp, lossless": encoded(drawn(), "WEBP", lossless=True),
    "webp, transparent": encoded(drawn(mode="RGBA"), "WEBP"),
    "webp, turned": encoded(drawn(), "WEBP", exif=turned(5, "me")),
    "webp, moving": moving("WEBP"),
    "gif": encoded(drawn(), "GIF"),
    "gif, moving": moving("GIF"),
    "png, moving": moving("PNG"),
    "bmp": encoded(drawn(), "BMP"),
    "tiff": encoded(drawn(), "TIFF"),
    "tiff, turned": encoded(drawn(), "TIFF", exif=turned(6)),
    "ppm": encoded(drawn(), "PPM"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_header_is_what_the_decoder_finds(name: str) -> None:
    found, picture = header(PICTURES[name]), decode(PICTURES[name])
    assert (found.width, found.height) == picture.size
    assert sorted(picture.size) == [7, 9]
    assert found.format == Image.open(io.BytesIO(PICTURES[name])).format
    assert moves(PICTURES[name], found.format) == ("moving" in name)


@pytest.mark.parametrize("name", [name for name in PICTURES if name.split(",")[0] not in ("tiff", "ppm")])
def test_the_plain_cases_are_read_without_pillow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> Header:
        raise AssertionError

    monkeypatch.setattr(headers, "_by_pillow", refuse)
    if name in ("jpeg, turned by XMP", "webp, turned"):
        with pytest.raises(AssertionError):
            header(PICTURES[name])
    else:
        assert sorted((header(PICTURES[name]).width, header(PICTURES[name]).height)) == [7, 9]


def test_the_copyright_is_read() -> None:
    assert header(PICTURES["jpeg, on its side"]).rights == "(c) somebody"
    assert header(PICTURES["webp, turned"]).rights == "me"
    assert header(PICTURES["jpeg"]).rights == ""


def test_a_frame_that_is_larger_than_its_screen_counts() -> None:
    gif = bytearray(PICTURES["gif"])
    gif[6:10] = b"\2\0\2\0"
    assert (header(bytes(gif)).width, header(bytes(gif)).height) == Image.open(io.BytesIO(bytes(gif))).size == (9, 7)


def test_clips_tell_their_size() -> None:
    for film in (mp4(640, 360), mp4(640, 360, late=False), webm(640, 360)):
        found = header(film)
        assert (found.width, found.height) == (640, 360)
        assert moves(film, found.format)
    assert (header(mp4(640, 360, on_its_side=True)).width, header(mp4(640, 360)).format) == (360, "MP4")
    assert header(webm(1, 1)).format == "WEBM"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no picture", "not an image"),
        (b"\0\0\0\x18ftypheic", "not an image"),
        (encoded(Image.new("1", (9000, 9000))), "too large: more than 64 megapixels"),
        (PICTURES["png"][:20], "cannot be decoded|not an image"),
    ],
)
def test_what_is_no_image_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        header(content)


def test_a_scan_reads_no_more_than_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (name, content) in enumerate(PICTURES.items()):
        (tmp_path / f"{number:02}.{name.split(',')[0]}").write_bytes(content)
    (tmp_path / "a.mp4").write_bytes(mp4(32, 16))
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").symlink_to("/etc/passwd")
    found = dict(scan(str(tmp_path)))
    assert list(found) == sorted(found)
    assert len(found) == len(PICTURES) + 3
    for number, (name, content) in enumerate(PICTURES.items()):
        assert found[f"{number:02}.{name.split(',')[0]}"] == header(content), name
    assert found["a.mp4"] == Header(32, 16, "MP4")
    assert found["b.png"] == Bad("b.png", "empty file")
    assert found["c.png"] == Bad("c.png", "a link out of the folder")
    large = PICTURES["jpeg"] + bytes(1 << 18)
    (tmp_path / "d.jpg").write_bytes(large)
    monkeypatch.setattr(headers, "read", lambda path: pytest.fail("it was read whole"))
    assert headers._scan_one(str(tmp_path / "d.jpg")) == Header(9, 7, "JPEG")


def spoilt(random: random.Random) -> bytes:
    """A file that was damaged in one of the ways that files are, or that somebody made to do harm."""
    content = bytearray(random.choice([*PICTURES.values(), mp4(32, 16), webm(32, 16)]))
    match random.randrange(5):
        case 0:
            del content[random.randrange(len(content)) :]
        case 1:
            for _ in range(random.randint(1, 20)):
                content[random.randrange(min(len(content), 400))] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
        case 2:
            at = random.randrange(len(content))
            content[at:at] = random.randbytes(random.randint(1, 200))
        case 3:
            at = random.randrange(min(len(content), 100))
            content[at : at + 4] = random.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
        case 4:
            content[random.randrange(4, 16) :] = random.randbytes(random.randrange(300))
    return bytes(content)


def feed(seed: int, count: int) -> int:
    """Show spoilt files to whatever reads them; how many had a header."""
    draws, usable, reasons = random.Random(seed), 0, set[str]()
    for _ in range(count):
        content = spoilt(draws)
        try:
            found = header(content)
            usable += 1
            assert found.width * found.height <= headers.MAX_PIXELS or found.format in ("MP4", "WEBM")
            moves(content, found.format)
            if found.format not in ("MP4", "WEBM"):
                decode(content)
        except UnusableError as error:
            reasons.add(str(error))
    assert not any("\n" in reason or not reason for reason in reasons)
    return usable


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_spoilt_files_do_no_harm() -> None:
    assert 0 < feed(seed=0, count=400) < 400
