"""Files of every kind, for the tests of what reads them."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def drawn(seed: int = 0, width: int = 9, height: int = 7, mode: str = "RGB") -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def turned(orientation: int, rights: str = "") -> Image.Exif:
    """EXIF that says which way up, and whose."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if rights:
        exif[0x8298] = rights
    return exif


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def moving(format: str = "GIF", frames: int = 3) -> bytes:
    """An animation."""
    first, *rest = (drawn(seed) for seed in range(frames))
    return encoded(first, format, save_all=True, append_images=rest, duration=50)


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


def mp4(width: int, height: int, on_its_side: bool = False, late: bool = True) -> bytes:
    """A film of no frames: an empty track, as that of sound is, and one that has a size."""
    one = 1 << 16
    matrix = (0, one, 0, -one, 0, 0, 0, 0, 1 << 30) if on_its_side else (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    tracks = b""
    for w, h in ((0, 0), (width, height)):
        tracks += box(b"trak", box(b"tkhd", bytes(40) + struct.pack(">9i", *matrix) + struct.pack(">II", w << 16, h << 16)))
    films = [box(b"mdat", bytes(300)), box(b"moov", box(b"mvhd", bytes(100)) + tracks)]
    return box(b"ftyp", b"isom\0\0\0\0") + b"".join(films if late else reversed(films))


def element(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack(">Q", 1 << 56 | len(data)) + data


def webm(width: int, height: int) -> bytes:
    """A film of no frames, whose segment does not know its length."""
    video = element(b"\xe0", element(b"\xb0", width.to_bytes(2, "big")) + element(b"\xba", height.to_bytes(2, "big")))
    tracks = element(b"\x16\x54\xae\x6b", element(b"\xae", element(b"\xd7", b"\1") + video))
    return element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"webm")) + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + tracks


def tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of files, or of members that are described."""
    with tarfile.open(path, "w", format=format) as file:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            info.name, info.size = name, len(data)
            file.addfile(info, io.BytesIO(data))
    return path
