"""Where it fits: what a file says of itself before anything is decoded.

In: the bytes of a file. Out: its size upright, its format, whether it moves, and whose it is; or `UnusableError` with the reason.
How: the plain case of a common format is read here, which takes microseconds. Whatever is not plain is left to Pillow, which takes a
hundred; so what is read here must be what Pillow would say.
Gotchas: a header may promise what the rest does not keep: only decoding tells. `scan` reads the first `HEAD` bytes where they suffice, and
so passes over the one turn that can stand later, that of a PNG whose EXIF follows its pixels.
"""

import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from mezzotint.data.decode import FORMATS, MAX_PIXELS, UnusableError, opened
from mezzotint.data.survey import SUFFIXES, Bad, Contents, survey

CLIPS = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
HEAD = 1 << 16
LIMIT = 1 << 28  # bytes of one file
THREADS = 4
CHUNK = 256  # files that a thread takes at once
ORIENTATION, COPYRIGHT = 0x0112, 0x8298  # EXIF's tags


@dataclass(frozen=True)
class Header:
    """width, height: upright, in pixels; 0 for a clip that does not tell. format: the decoder's name. rights: EXIF's copyright, or ""."""

    width: int
    height: int
    format: str
    rights: str = ""


def header(content: bytes) -> Header:
    """Of an image or a clip; `UnusableError` if it is neither."""
    found = _plain(content) or _container(content)
    return found or _by_pillow(content)


def moves(content: bytes, format: str) -> bool:
    """Whether a file is a clip: a video, or an animation of more than one frame."""
    if format == "GIF":
        return _frames_of_gif(content)
    if format == "WEBP":
        return content[12:16] == b"VP8X" and bool(content[20] & 2)
    if format == "PNG":
        at = content.find(b"acTL", 0, HEAD)
        return at > 0 and int.from_bytes(content[at + 4 : at + 8], "big") > 1
    return format in ("MP4", "WEBM")


def scan(folder: str) -> Iterator[tuple[str, Header | Bad]]:
    """Every image and clip of a folder with its header, in the order of names. No more of a file is read than its head, if that tells."""
    contents = survey(folder)
    names = sorted(name for name in contents.files if name.lower().endswith((*SUFFIXES, *CLIPS)) or name in contents.captions)
    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(partial(_scan_some, contents), chunks):
            yield from found


def read(path: str | os.PathLike[str], limit: int = LIMIT) -> bytes:
    """A file, if it is not larger than `limit`."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise UnusableError(too_large(limit))
            return file.read(size)
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> UnusableError:
    return UnusableError("no permission to read" if isinstance(error, PermissionError) else f"cannot be read: {error.strerror}")


def too_large(limit: int) -> str:
    """The reason why a file of more bytes is not taken."""
    return f"too large: more than {limit / 1e6:,.3g} megabytes"


def _scan_some(contents: Contents, names: list[str]) -> list[tuple[str, Header | Bad]]:
    found: list[tuple[str, Header | Bad]] = []
    root = os.fspath(contents.root)
    for name in names:
        try:
            found.append((name, _scan_one(f"{root}/{name}") if not contents.files[name] else Bad(name, contents.files[name])))
        except UnusableError as error:
            found.append((name, Bad(name, str(error))))
    return found


def _scan_one(path: str) -> Header:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.read(file, HEAD)
        finally:
            os.close(file)
    except OSError as error:
        raise _unreadable(error) from None
    return _plain(head) or header(read(path))


def _plain(data: bytes) -> Header | None:
    """The header, if all of it is there and nothing about it is unusual."""
    for start, parse in PARSERS.items():
        if data.startswith(start):
            try:
                found = parse(data)
            except (IndexError, KeyError, struct.error):
                return None
            usable = found and found.width > 0 and found.height > 0 and found.width * found.height <= MAX_PIXELS
            return found if usable else None
    return None


def _by_pillow(content: bytes) -> Header:
    with opened(content) as image:
        format = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with another one behind it
        assert format in FORMATS
        exif = image.getexif()
        found = Header(image.width, image.height, format, str(exif.get(COPYRIGHT, "")).strip("\0 "))
        upright = format == "TIFF" and image.size == (exif.get(257), exif.get(256))  # Pillow has turned its size already
        return found if upright else _turned(found, exif.get(ORIENTATION, 1))


def _turned(found: Header, orientation: int) -> Header:
    return replace(found, width=found.height, height=found.width) if 5 <= orientation <= 8 else found


def _with_exif(found: Header, data: bytes, exif: bytes, end: int) -> Header | None:
    """With what the block of EXIF says, if nothing else before `end` says it too."""
    if data.find(b"tiff:Orientation", 0, end) >= 0:  # in XMP, to which Pillow listens where EXIF is silent
        return None
    if not exif:
        return found
    order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    orientation, rights = 1, ""
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", exif, at)
        if tag == ORIENTATION:
            (orientation,) = struct.unpack_from(f"{order}{ {3: 'H', 4: 'I'}[kind] }", exif, at + 8)
        elif tag == COPYRIGHT:
            (place,) = struct.unpack_from(f"{order}I", exif, at + 8)
            begin = at + 8 if number <= 4 else place
            rights = exif[begin : begin + number].decode("utf-8", "replace").strip("\0 ")
    return _turned(replace(found, rights=rights), orientation)


def _png(data: bytes) -> Header | None:
    if data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    at, exif = 8, b""
    while True:
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            if data.find(b"eXIf", at) >= 0:
                return None
            return _with_exif(Header(width, height, "PNG"), data, exif, at)
        if kind == b"eXIf":
            exif = data[at + 8 : at + 8 + size]
        at += 12 + size


def _jpeg(data: bytes) -> Header | None:
    at, exif = 2, b""
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a filling
            at += 1
            continue
        size, _, height, width = struct.unpack_from(">HBHH", data, at + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _with_exif(Header(width, height, "JPEG"), data, exif, at)
        if marker < 0xC0 or marker in (*range(0xD0, 0xDB), 0xFF):  # no segment that comes before the size
            return None
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif += data[at + 10 : at + 2 + size]
        at += 2 + size
    return None


def _gif(data: bytes) -> Header | None:
    """The first frame may reach beyond the screen, which then grows."""
    width, height = struct.unpack_from("<HH", data, 6)
    at = _first_block(data)
    while data[at] == 0x21:
        at = _after_blocks(data, at + 2)
    if data[at] != 0x2C:
        return None
    left, top, w, h = struct.unpack_from("<HHHH", data, at + 1)
    return Header(max(width, left + w), max(height, top + h), "GIF")


def _first_block(data: bytes) -> int:
    return 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)


def _after_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += 1 + data[at]
    return at + 1


def _frames_of_gif(data: bytes) -> bool:
    """Whether there is a second one."""
    try:
        at, frames = _first_block(data), 0
        while frames < 2 and data[at] in (0x21, 0x2C):
            if data[at] == 0x2C:
                frames += 1
                at = _after_blocks(data, at + 11 + (3 << ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0))
            else:
                at = _after_blocks(data, at + 2)
    except IndexError:
        pass
    return frames > 1


def _webp(data: bytes) -> Header | None:
    kind = data[8:16]
    if kind == b"WEBPVP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header(width & 0x3FFF, height & 0x3FFF, "WEBP")
    if kind == b"WEBPVP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, "WEBP")
    if kind == b"WEBPVP8X" and not data[20] & 0x0C and len(data) >= 30:  # no EXIF, no XMP: they would be at the end
        return Header(int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1, "WEBP")
    return None


def _bmp(data: bytes) -> Header | None:
    (size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<ii", data, 18)
    return Header(width, abs(height), "BMP") if size in (40, 108, 124) else None


PARSERS: dict[bytes, Callable[[bytes], Header | None]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"GIF8": _gif,
    b"BM": _bmp,
}


# Clips: only the size of the first track that has one.


def _container(data: bytes) -> Header | None:
    """The header of an MP4 or WebM, None if it is neither."""
    try:
        if data[4:8] == b"ftyp" and any(kind == b"moov" for kind, _, _ in _boxes(data, 0, len(data))):
            return _mp4(data)
        if data[:4] == b"\x1a\x45\xdf\xa3":
            sizes = [dict(video) for video in _videos(data)]
            return Header(sizes[0].get(0xB0, 0), sizes[0].get(0xBA, 0), "WEBM") if sizes else Header(0, 0, "WEBM")
    except (IndexError, struct.error):
        return Header(0, 0, "MP4" if data[4:8] == b"ftyp" else "WEBM")
    return None


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kinds of boxes, and where their contents begin and end."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        begin = at + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, begin)
            begin += 8
        stop = end if size == 0 else at + size
        if stop < begin:
            return
        yield kind, begin, min(stop, end)
        at = stop


def _mp4(data: bytes) -> Header:
    for _, begin, end in (box for box in _boxes(data, 0, len(data)) if box[0] == b"moov"):
        for _, first, last in (box for box in _boxes(data, begin, end) if box[0] == b"trak"):
            for _, at, _ in (box for box in _boxes(data, first, last) if box[0] == b"tkhd"):
                matrix = at + (52 if data[at] else 40)  # of version 1, whose times are longer; or 0
                a, b = struct.unpack_from(">ii", data, matrix)
                width, height = (side >> 16 for side in struct.unpack_from(">II", data, matrix + 36))
                if width and height:
                    return Header(height, width, "MP4") if b and not a else Header(width, height, "MP4")
    return Header(0, 0, "MP4")


def _videos(data: bytes) -> Iterator[list[tuple[int, int]]]:
    """The numbers that are noted of each video track of a WebM."""
    for _, begin, end in (e for e in _elements(data, 0, len(data)) if e[0] == 0x18538067):
        for _, first, last in (e for e in _elements(data, begin, end) if e[0] == 0x1654AE6B):
            for _, at, stop in (e for e in _elements(data, first, last) if e[0] == 0xAE):
                for _, a, b in (e for e in _elements(data, at, stop) if e[0] == 0xE0):
                    yield [(kind, int.from_bytes(data[x:y], "big")) for kind, x, y in _elements(data, a, b) if y - x <= 4]


def _elements(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The ids of EBML's elements, and where their contents begin and end; one of unknown size lasts until the end."""
    while at < end and data[at]:
        length = 9 - data[at].bit_length()  # of the id, whose first bits say it
        kind = int.from_bytes(data[at : at + length], "big")
        at += length
        if not data[at]:
            return
        length = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + length], "big") - (1 << 7 * length)
        at += length
        stop = end if size == (1 << 7 * length) - 1 else min(at + size, end)
        yield kind, at, stop
        at = stop
