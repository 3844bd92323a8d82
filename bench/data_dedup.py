"""How many copies of pictures deduplication finds, and how many pairs it reports that are none.

Originals, each with one copy by every transformation below, lie among other pictures in one table. Two kinds are drawn, each in a table
of its own: "photo", dead leaves (Lee, Mumford and Huang 2001: textured shapes of all sizes that hide each other, with the statistics of
photographs), and "flat", icons on white that differ from a neighbour in one colour, one sign or its place.

`recall`: the share of copies that are reported as a pair with their original; none is found by way of another. `false_per_10k`: pairs
reported that are no copies of one original, in 10,000 pairs reported; a pair is counted once. `phash`: the same of originals and copies
alone by the 64 bits of ImageHash's phash, of which up to 10 differ, also from those of the mirrored picture, where it is installed.
`dedup_recall` and `dedup_false_per_10k` are of photographs; those of icons end in `_flat`, and in `_flat_whole` where only whole pictures
count as the same, as in the recipe `pixels`.

    python bench/data_dedup.py [--originals 200] [--rows 5000] [--flat-rows 5000] [--workers 1]
"""

import argparse
import io
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from mezzotint.curation.dedup import Duplicates, Perceptual, clusters
from mezzotint.curation.hashes import Fingerprints
from mezzotint.curation.near import pairs
from mezzotint.curation.stage import run
from mezzotint.data.table import Table, schema

Generator = np.random.Generator
FIELD = 1024  # side of the noise that textures are cut from
TRANSFORMATIONS: dict[str, Callable[[Image.Image, Generator], Image.Image]] = {
    "half the size": lambda image, g: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "double the size": lambda image, g: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "four fifths as wide": lambda image, g: image.resize((image.width * 4 // 5, image.height), Image.Resampling.BICUBIC),
    "JPEG of quality 30": lambda image, g: compressed(image, "JPEG", 30),
    "WebP of quality 30": lambda image, g: compressed(image, "WEBP", 30),
    "5% less on every side": lambda image, g: cropped(image, [0.05] * 4),
    "up to 10% less on each side": lambda image, g: cropped(image, g.uniform(0, 0.1, 4)),
    "mirrored": lambda image, g: ImageOps.mirror(image),
    "15% darker or brighter": lambda image, g: ImageEnhance.Brightness(image).enhance(g.choice([0.85, 1.15])),
    "cropped by 8%, half the size, JPEG 50": lambda image, g: compressed(
        cropped(image, g.uniform(0, 0.08, 4)).resize((image.width // 2, image.height // 2)), "JPEG", 50
    ),
}
SHAPES, SIGNS, PLACES = range(6), range(8), list(product((0.3, 0.4, 0.5), (0.35, 0.5, 0.65)))  # no two are mirror images
COLOURS = ("red", "orange", "gold", "green", "teal", "blue", "purple", "deeppink", "saddlebrown", "black")


def compressed(image: Image.Image, kind: str, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, shares: Any) -> Image.Image:
    left, top, right, bottom = (round(share * side) for share, side in zip(shares, (image.width, image.height) * 2, strict=True))
    return image.crop((left, top, image.width - right, image.height - bottom))


@cache
def field() -> Any:
    """Noise whose amplitude falls with frequency, as that of photographs does."""
    frequency = np.hypot(np.fft.fftfreq(FIELD)[:, None], np.fft.rfftfreq(FIELD)) * FIELD
    phase = np.random.default_rng(0).standard_normal((2, *frequency.shape))
    noise = np.fft.irfft2((phase[0] + 1j * phase[1]) / np.maximum(4, frequency))
    return (noise / noise.std()).astype(np.float32)


def photo(g: Generator, width: int) -> Image.Image:
    height = width * 3 // 4
    image = Image.new("RGB", (width, height), tuple(g.integers(40, 220, 3).tolist()))
    draw = ImageDraw.Draw(image)
    palette = g.integers(20, 235, (4, 3))
    radii = width * np.clip(0.024 / (1 - 0.99 * g.random(g.integers(20, 60))) ** 0.6, 0, 0.4)
    for r in -np.sort(-radii):
        x, y, flat = g.uniform(0, width), g.uniform(0, height), g.uniform(0.4, 1)
        colour = tuple(np.clip(palette[g.integers(4)] + g.normal(0, 30, 3), 0, 255).astype(int).tolist())
        if g.random() < 0.5:
            draw.ellipse((x - r, y - r * flat, x + r, y + r * flat), fill=colour)
        else:
            draw.regular_polygon((x, y, r), int(g.integers(3, 6)), rotation=int(g.integers(360)), fill=colour)
    x, y = g.integers(0, FIELD - width, 2)
    texture = field()[y : y + height, x : x + width, None]
    return Image.fromarray(np.clip(np.asarray(image) * (1 + 0.12 * texture) + g.uniform(3, 12) * texture, 0, 255).astype(np.uint8))


def icon(number: int, width: int) -> Image.Image:
    """One of all icons there are, in an order that is mixed."""
    every = (len(SHAPES), len(COLOURS), len(SIGNS), len(COLOURS) - 1, len(PLACES))
    total = int(np.prod(every))
    shape, colour, sign, other, place = (int(k) for k in np.unravel_index(number * 7919 % total, every))
    image = Image.new("RGB", (width * 2, width * 2), "white")
    draw = ImageDraw.Draw(image)

    def paint(kind: int, x: float, y: float, r: float, fill: str) -> None:
        x, y, r = (2 * width * v for v in (x, y, r))
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == 1:
            draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r / 2))
        elif kind == 2:
            draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        else:
            draw.regular_polygon((x, y, r), kind, rotation=15 * (kind - 3), fill=fill)

    paint((0, 3, 4, 5, 6, 8)[shape], 0.5, 0.5, 0.45, COLOURS[colour])
    paint(sign, *PLACES[place], 0.14, COLOURS[(colour + 1 + other) % len(COLOURS)])
    return image.resize((width, width), Image.Resampling.LANCZOS)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def rows(kind: str, originals: int, count: int) -> Iterator[pa.RecordBatch]:
    """Originals and their copies, whose ids are "7/mirrored", then others up to `count`."""
    named: list[tuple[str, bytes]] = []
    numbers = iter(range(count))

    def draw(number: int, width: int) -> Image.Image:
        return photo(np.random.default_rng(number), width) if kind == "photo" else icon(number, width)

    for number in range(originals):
        g, image = np.random.default_rng([1, number]), draw(number, 192)
        copies = {name: change(image, g) for name, change in TRANSFORMATIONS.items()}
        named += [(f"{number}/{name}", encoded(picture)) for name, picture in {"": image, **copies}.items()]
        yield from _batches(named, numbers, 512)
    for number in range(originals, count - originals * len(TRANSFORMATIONS)):
        named.append((f"{number}/", encoded(draw(number, 128 if kind == "photo" else 96))))
        yield from _batches(named, numbers, 512)
    yield from _batches(named, numbers, 1)


def _batches(named: list[tuple[str, bytes]], numbers: Iterator[int], least: int) -> Iterator[pa.RecordBatch]:
    if len(named) >= least:
        plain = {"media": "image", "captions": [], "width": 1, "height": 1, "format": "PNG", "source": "", "fault": ""}
        yield pa.RecordBatch.from_pylist(
            [{"id": name, "content": content, "sha256": f"{next(numbers)}", **plain} for name, content in named], schema=schema()
        )
        named.clear()


def measure(kind: str, originals: int, count: int, workers: int, folder: Path) -> dict[str, dict[str, Any]]:
    """The numbers of a kind by the ends of their keys."""
    begin = time.perf_counter()
    table = Table.create(folder / f"{kind}.lance", rows(kind, originals, count))
    drawn = time.perf_counter()
    table = run(table, Fingerprints(), workers=workers)
    printed = time.perf_counter()
    seconds = {"drawing": drawn - begin, "fingerprints": printed - drawn}
    if kind == "photo":
        return {"": seek(table, Perceptual(), originals, workers) | {"drawn": seconds}}
    whole = seek(table, Perceptual(crops=False), originals, workers)
    return {"_flat": seek(table, Perceptual(), originals, workers) | {"drawn": seconds}, "_flat_whole": whole}


def seek(table: Table, look: Perceptual, originals: int, workers: int) -> dict[str, Any]:
    """What a look finds in a table with fingerprints."""
    begin = time.perf_counter()
    found = pairs(table, look, workers=workers)
    sought = time.perf_counter() - begin
    names = [name.split("/") for name in table.read(["id"])["id"].to_pylist()]
    where = {tuple(name): row for row, name in enumerate(names)}
    reported = {(min(a, b), max(a, b)) for a, b in found.tolist()}
    false = sum(names[a][0] != names[b][0] for a, b in reported)
    recall = {
        name: sum((where[str(k), ""], where[str(k), name]) in reported for k in range(originals)) / originals for name in TRANSFORMATIONS
    }
    cluster, copies = clusters(len(table), found), originals * (len(TRANSFORMATIONS) + 1)
    sizes = np.unique(cluster[:copies], return_counts=True)[1]
    return {
        "recall": sum(recall.values()) / len(recall),
        "false_per_10k": 10_000 * false / max(1, len(reported)),
        "false": false,
        "pairs": len(reported),
        "recall_by": recall,
        "clusters_whole": int((sizes == len(TRANSFORMATIONS) + 1).sum()) / originals,
        "phash": phash(table, names[:copies]) if look.crops else None,
        "rows": len(table),
        "search_seconds": sought,
    }


def phash(table: Table, names: list[list[str]]) -> dict[str, Any] | None:
    """The peer: recall by transformation, and pairs that are none."""
    try:
        import imagehash
    except ImportError:
        return None
    images = [Image.open(io.BytesIO(x)) for x in table.take(list(range(len(names))), ["content"])["content"].to_pylist()]
    bits = np.stack([imagehash.phash(image).hash.ravel() for image in images]).astype(np.float32)
    turned = np.stack([imagehash.phash(ImageOps.mirror(image)).hash.ravel() for image in images]).astype(np.float32)
    near = np.minimum(*(64 - bits @ other.T - (1 - bits) @ (1 - other.T) for other in (bits, turned))) <= 10
    owner = np.array([int(name) for name, _ in names])
    same = owner[:, None] == owner
    first = {name: row for row, (name, copy) in enumerate(names) if not copy}
    hit: dict[str, list[bool]] = {}
    for row, (name, copy) in enumerate(names):
        hit.setdefault(copy, []).append(bool(near[row, first[name]]))
    recall = {copy: float(np.mean(those)) for copy, those in hit.items() if copy}
    upper = np.triu(near, 1)
    return {
        "recall": float(np.mean(list(recall.values()))),
        "false_per_10k": 1e4 * float((upper & ~same).sum() / max(1, upper.sum())),
        "recall_by": recall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--originals", type=int, default=200)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--flat-rows", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    least = options.originals * (len(TRANSFORMATIONS) + 1)
    if any(0 < count < least for count in (options.rows, options.flat_rows)):
        parser.error(f"{options.originals} originals and their copies are {least} rows; ask for as many, or for none of a kind")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"photo": options.rows, "flat": options.flat_rows}
        of = [measure(kind, options.originals, count, options.workers, Path(folder)) for kind, count in sizes.items() if count]
    result: dict[str, Any] = {"settings": Duplicates().to_data(), "originals": options.originals}
    for end, found in (item for each in of for item in each.items()):
        result |= {f"dedup_{name}{end}": found.pop(name) for name in ("recall", "false_per_10k")} | {end.lstrip("_") or "photo": found}
    result["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
