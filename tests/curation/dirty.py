"""Clean pictures, and the same with dirt of known kinds planted: the truth that filters are measured against."""

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from mezzotint.data import table as tables
from mezzotint.data.decode import decode
from mezzotint.pictures import to_pil
from mezzotint.worlds.caption import describe, write
from mezzotint.worlds.render import render
from mezzotint.worlds.splits import draw

Floats = NDArray[np.float32]
WORDS = ("SALE", "LIMITED OFFER", "photo by me", "CLICK HERE", "Breaking news", "www.pictures.example", "2026-11-21 18:49", "SAMPLE")


@dataclass(frozen=True)
class Sample:
    """A file, its caption, what is wrong with it ("" if nothing), and of which clean one it was made."""

    id: str
    content: bytes
    caption: str = ""
    dirt: str = ""
    of: str = ""


def field(rng: np.random.Generator, high: int, wide: int, slope: float) -> Floats:
    """Noise whose amplitude falls as 1 / frequency^slope, as that of photographs does at about 1; mean 0, deviation 1."""
    down, across = np.fft.fftfreq(high)[:, None], np.fft.rfftfreq(wide)[None, :]
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    phase = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    noise = np.fft.irfft2(phase / frequency**slope, s=(high, wide)).astype(np.float32)
    return (noise - noise.mean()) / noise.std()


def photo(seed: int, wide: int = 512, high: int = 384) -> Image.Image:
    """Something like a photograph: textures of several roughnesses with hard outlines between them, under uneven light."""
    rng = np.random.default_rng(seed)
    light = np.linspace(-1, 1, wide)[None, :] * rng.normal(0, 20) + np.linspace(-1, 1, high)[:, None] * rng.normal(0, 20)
    picture = _texture(rng, wide, high)
    for _ in range(rng.integers(2, 7)):
        mask = Image.new("1", (wide, high))
        middle, spread = rng.uniform(0, 1, 2) * (wide, high), rng.uniform(0.05, 0.35) * min(wide, high)
        corners = middle + rng.normal(0, spread, (rng.integers(3, 7), 2))
        if rng.random() < 0.5:
            ImageDraw.Draw(mask).polygon([tuple(c) for c in corners.tolist()], fill=1)
        else:
            ImageDraw.Draw(mask).ellipse([*(middle - spread), *(middle + spread)], fill=1)
        inside = np.asarray(mask)[..., None]
        picture = np.where(inside, _texture(rng, wide, high), picture)
    grain = rng.normal(0, rng.uniform(0.5, 3), picture.shape)
    return Image.fromarray(np.clip(picture + light[..., None] + grain, 0, 255).astype(np.uint8))


def _texture(rng: np.random.Generator, wide: int, high: int) -> Floats:
    noise = field(rng, high, wide, rng.uniform(0.9, 1.7))[..., None]
    colour = rng.uniform(30, 225, 3)
    return (colour + noise * rng.uniform(5, 45) * rng.uniform(0.5, 1.2, 3)).astype(np.float32)


def photos(count: int, seed: int = 0) -> list[Sample]:
    """Photo-like JPEGs of 512 x 384 or upright."""
    sizes = [(512, 384), (384, 512)]
    return [Sample(f"photo-{n:05}", _jpeg(photo(seed + n, *sizes[n % 2])), f"texture {n}") for n in range(count)]


def worlds(count: int, size: int = 384, seed: int = 0) -> list[Sample]:
    """Renders of Worlds as PNG."""
    rng = random.Random(seed)
    scenes = [draw(rng, "any") for _ in range(count)]
    said = [write(describe(scene, rng), rng) for scene in scenes]
    return [Sample(f"worlds-{n:05}", _png(to_pil(x)), text) for n, (x, text) in enumerate(zip(render(scenes, size), said, strict=True))]


def emoji(folder: Path, count: int) -> list[Sample]:
    """Pictures of a folder with metadata.jsonl, evenly spread over it."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    chosen = lines[:: max(1, len(lines) // count)][:count]
    return [Sample(line["file_name"], (folder / line["file_name"]).read_bytes(), line["text"]) for line in chosen]


def _jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


Plant = Callable[[Image.Image, random.Random], bytes]


def blur(picture: Image.Image, rng: random.Random) -> bytes:
    """Out of focus: a deviation of 0.4% to 2% of the longer side, at least one pixel."""
    return _jpeg(picture.filter(ImageFilter.GaussianBlur(max(1.0, max(picture.size) * rng.uniform(0.004, 0.02)))))


def flat(picture: Image.Image, rng: random.Random) -> bytes:
    """One colour, with a spot of the picture in it now and then."""
    canvas = Image.new("RGB", picture.size, (rng.randrange(256), rng.randrange(256), rng.randrange(256)))
    if rng.random() < 0.5:
        canvas.paste(picture.resize((max(1, picture.width // 8), max(1, picture.height // 8))), (picture.width // 3, picture.height // 3))
    return _jpeg(canvas)


def tiny(picture: Image.Image, rng: random.Random) -> bytes:
    """A thumbnail: at most 0.45 of the size."""
    share = rng.uniform(0.1, 0.45)
    return _png(picture.resize((max(1, int(picture.width * share)), max(1, int(picture.height * share)))))


def narrow(picture: Image.Image, rng: random.Random) -> bytes:
    """A banner of four to ten times its height, no smaller than the picture at its shorter side."""
    side = min(picture.size)
    return _jpeg(ImageOps.fit(picture, (int(side * rng.uniform(4, 10)), side)))


def text(picture: Image.Image, rng: random.Random) -> bytes:
    """One to three lines of words on it, in white or black with an outline of the other, from a fifteenth to an eighth of the height."""
    canvas = picture.copy()
    pen = ImageDraw.Draw(canvas)
    size = max(10, int(picture.height * rng.uniform(0.065, 0.12)))
    for line in rng.sample(WORDS, rng.randint(1, 3)):
        place = (rng.randint(0, picture.width // 4), rng.randint(0, max(1, picture.height - size)))
        ink, rim = rng.sample(("white", "black"), 2)
        pen.text(place, line, fill=ink, stroke_fill=rim, stroke_width=max(1, size // 16), font=ImageFont.load_default(size))
    return _jpeg(canvas)


def watermark(picture: Image.Image, rng: random.Random) -> bytes:
    """An owner's mark, a quarter to half opaque, all over the picture."""
    side = max(24, min(picture.size) // rng.randint(3, 5))
    mark = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mark)
    pen.text((0, side // 3), rng.choice(("(c) ME", "stock", "AGENCY")), fill=255, font=ImageFont.load_default(max(8, side // 4)))
    pen.ellipse([side // 8, side // 12, side // 3, side // 3], outline=255, width=max(1, side // 24))
    layer = Image.new("L", picture.size)
    for left in range(0, picture.width, side):
        for top in range(0, picture.height, side):
            layer.paste(mark, (left, top))
    opacity = rng.uniform(0.25, 0.5)
    return _jpeg(Image.composite(Image.new("RGB", picture.size, "white"), picture, layer.point(lambda x: int(x * opacity))))


def truncated(picture: Image.Image, rng: random.Random) -> bytes:
    """A download that broke off."""
    content = rng.choice((_jpeg, _png))(picture)
    return content[: int(len(content) * rng.uniform(0.2, 0.95))]


def flipped(picture: Image.Image, rng: random.Random) -> bytes:
    """A PNG with a byte of its pixels changed, which its checksums tell."""
    content = bytearray(_png(picture))
    content[rng.randrange(len(content) // 4, len(content) - 24)] ^= 1 << rng.randrange(8)
    return bytes(content)


def flipped_jpeg(picture: Image.Image, rng: random.Random) -> bytes:
    """A JPEG with bytes of its pixels changed, which has no checksums."""
    content = bytearray(_jpeg(picture))
    for _ in range(8):
        content[rng.randrange(len(content) // 3, len(content) - 24)] ^= 1 << rng.randrange(8)
    return bytes(content)


def resized(picture: Image.Image, rng: random.Random) -> bytes:
    """A copy at 0.6 to 0.9 of the size."""
    share = rng.uniform(0.6, 0.9)
    return _png(picture.resize((max(1, int(picture.width * share)), max(1, int(picture.height * share)))))


def recompressed(picture: Image.Image, rng: random.Random) -> bytes:
    """A copy as JPEG of quality 40 to 80."""
    return _jpeg(picture, rng.randint(40, 80))


def cropped(picture: Image.Image, rng: random.Random) -> bytes:
    """A copy without up to 4% at each edge."""
    wide, high = picture.size
    left, top, right, bottom = (rng.uniform(0, 0.04) for _ in range(4))
    return _png(picture.crop((int(left * wide), int(top * high), wide - int(right * wide), high - int(bottom * high))))


DIRT: dict[str, Plant] = {plant.__name__: plant for plant in (blur, flat, tiny, narrow, text, watermark, truncated, flipped, flipped_jpeg)}
COPIES: dict[str, Plant] = {plant.__name__: plant for plant in (resized, recompressed, cropped)}
EXACT = "exact"  # the same file again
SWAPPED = "swapped"  # the captions of two pictures have changed places


def dirty(clean: Sequence[Sample], each: int, kinds: Sequence[str] = (*DIRT, EXACT, *COPIES, SWAPPED), seed: int = 0) -> list[Sample]:
    """The clean pictures and `each` of every kind of dirt, made of clean ones drawn at random; in a random order, the same for a seed.

    Of those whose captions are swapped there is no clean one.
    """
    rng = random.Random(seed)
    found = list(clean)
    plants = {**DIRT, **COPIES}
    for kind in kinds:
        if kind == SWAPPED:
            chosen = rng.sample(range(len(clean)), each - each % 2)
            for one, other in zip(chosen, chosen[::-1], strict=True):
                found[one] = replace(clean[one], caption=clean[other].caption, dirt=SWAPPED)
            continue
        for number, source in enumerate(rng.choices(clean, k=each)):
            content = source.content if kind == EXACT else plants[kind](decode(source.content), rng)
            found.append(Sample(f"{kind}-{number:05}", content, source.caption, kind, source.id))
    rng.shuffle(found)
    return found


def rows(samples: Sequence[Sample]) -> Iterator[pa.RecordBatch]:
    """Samples as rows of a new table."""
    plain = {"media": "image", "width": 0, "height": 0, "format": "", "source": "drawn", "fault": ""}
    for first in range(0, len(samples), tables.ROWS):
        some = samples[first : first + tables.ROWS]
        known = [
            {"id": s.id, "content": s.content, "captions": [s.caption], "sha256": sha256(s.content).hexdigest(), **plain} for s in some
        ]
        yield pa.RecordBatch.from_pylist(known, schema=tables.schema())
