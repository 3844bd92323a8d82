"""How fast the sizes of the images of a folder are read: ours and Pillow's in turns, medians over rounds.

python bench/data_scan.py [--files 100000] [--rounds 5]
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mezzotint.data.header import Header, scan

KINDS = ("JPEG", "PNG", "WEBP")
FOLDER = 1000  # files in a subfolder
PEER = 2000  # files that Pillow is timed on


def encoded(count: int = 30) -> list[tuple[str, bytes]]:
    """Small pictures of noise in several formats, as endings and contents."""
    pictures = []
    for seed in range(count):
        kind, draw = KINDS[seed % len(KINDS)], np.random.default_rng(seed)
        pixels = draw.integers(0, 256, (32 + seed, 48, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **({"exif": _exif()} if kind == "JPEG" else {}))
        pictures.append((kind.lower(), file.getvalue()))
    return pictures


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def fill(folder: Path, count: int) -> None:
    pictures = encoded()
    for number in range(count):
        if number % FOLDER == 0:
            (folder / f"{number // FOLDER:04}").mkdir()
        ending, content = pictures[number % len(pictures)]
        (folder / f"{number // FOLDER:04}" / f"{number:07}.{ending}").write_bytes(content)


def by_pillow(files: list[Path]) -> float:
    """Files a second with Pillow, one after another, upright as ours."""
    start = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            image.getexif()
    return len(files) / (time.perf_counter() - start)


def by_us(folder: Path, count: int) -> tuple[float, float]:
    """Files a second, and files a second of processor time, which the neighbours of a machine do not change."""
    start, busy = time.perf_counter(), time.process_time()
    found = sum(isinstance(header, Header) for _, header in scan(str(folder)))
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    assert found == count
    return count / seconds, count / busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, options.files)
        files = sorted(folder.rglob("*.jpeg"))[:PEER]
        ours, busy, theirs = [], [], []
        for number in range(options.rounds + 1):
            rates = *by_us(folder, options.files), by_pillow(files)
            if number:  # the first round warms the cache
                for kept, rate in zip((ours, busy, theirs), rates, strict=True):
                    kept.append(rate)
    medians = {"scan_per_s": ours, "scan_per_cpu_s": busy, "pillow_per_s": theirs}
    print(json.dumps({"files": options.files, **{name: statistics.median(rates) for name, rates in medians.items()}}))


if __name__ == "__main__":
    main()
