"""The probe and the verdicts on photo-like JPEGs, against the usual script: PIL, numpy and a pool of processes.

Both have the same files, measure the same things at the same size, and keep rows by the same thresholds, with as many processes. The
script reads files of a folder, decodes each whole and writes JSON lines; ours reads a table and adds columns to it, with all that this
brings: fragments, a journal, commits. The two run alternately; the script's processes are started before the clock, ours are not.
`curate_ratio` is rows a second of ours over the script's, `curate_cpu_ratio` rows in a second of processor time, which other work on the
machine changes little. Duplicates are not part of it. `peak_mb` is the largest resident size of a process that curates a tenth of the
rows, and all of them (`--tenfold`).

    python bench/data_curate.py [--rows 20000] [--rounds 3] [--workers 2] [--tenfold] [--pictures FOLDER, which is kept]
"""

import argparse
import json
import multiprocessing
import multiprocessing.pool
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from mezzotint.curation.cuts import Cut, curate, funnel
from mezzotint.curation.dedup import Duplicates
from mezzotint.curation.measures import measure
from mezzotint.data import table as tables
from mezzotint.data.table import Table
from mezzotint.recipes.curation import photos

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "curation"))

import dirty

WIDE, HIGH, SIDE = 1280, 960, 512
DRAWN = 12  # pictures; the others are put together of their parts


@cache
def base(seed: int) -> Image.Image:
    """One of the pictures that all others are made of, once in a process."""
    return dirty.photo(seed, WIDE + 64, HIGH + 64)


def draw(path: Path) -> None:
    """A photo-like JPEG of 1280 x 960, another for each name: cut from one that was drawn, a part of a second before it, in other light."""
    rng = random.Random(path.stem)
    picture, other = (_cut(base(seed), rng) for seed in rng.sample(range(DRAWN), 2))
    mask = Image.new("1", picture.size)
    middle, spread = (rng.uniform(0, WIDE), rng.uniform(0, HIGH)), rng.uniform(50, 400)
    corners = [(middle[0] + rng.gauss(0, spread), middle[1] + rng.gauss(0, spread)) for _ in range(rng.randrange(3, 8))]
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    picture.paste(other, mask=mask)
    light = [(rng.uniform(0.8, 1.2), rng.uniform(-15, 15)) for _ in picture.getbands()]
    picture = picture.point([min(255, max(0, round(gain * level + more))) for gain, more in light for level in range(256)])
    picture.save(path, quality=rng.randrange(80, 96))


def _cut(picture: Image.Image, rng: random.Random) -> Image.Image:
    left, top = rng.randrange(64), rng.randrange(64)
    cut = picture.crop((left, top, left + WIDE, top + HIGH))
    return ImageOps.mirror(cut) if rng.random() < 0.5 else cut


def fill(folder: Path, rows: int, pool: multiprocessing.pool.Pool) -> list[Path]:
    """So many photo-like JPEGs; those that are there are left as they are."""
    paths = [folder / f"{number:06}.jpg" for number in range(rows)]
    for _ in pool.imap_unordered(draw, [path for path in paths if not path.exists()], chunksize=16):
        pass
    return paths


def look(path: Path) -> dict[str, Any]:
    """One picture by the script."""
    try:
        with Image.open(path) as image:
            whole = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        return {"path": str(path), "fault": str(error)}
    small = whole.resize((SIDE, round(SIDE * whole.height / whole.width)), Image.Resampling.BICUBIC)
    sides = {"short_side": min(whole.size), "aspect": max(whole.size) / min(whole.size)}
    return {"path": str(path), "fault": "", **sides, **asdict(measure(small))}


def within(value: float, cut: Cut) -> bool:
    """Whether the script keeps a picture for this value."""
    return (cut.least is None or value >= cut.least) and (cut.most is None or value <= cut.most)


def script(paths: list[Path], out: Path, pool: multiprocessing.pool.Pool) -> int:
    """All pictures by the script, whose processes end with it; how many it keeps."""
    kept = 0
    with out.open("w") as file:
        for row in pool.imap(look, paths, chunksize=16):
            good = not row["fault"] and all(within(row[cut.column], cut) for cut in photos().cuts if cut.column in row)
            kept += good
            file.write(json.dumps({**row, "kept": good}) + "\n")
    pool.close()
    pool.join()
    return kept


def ours(place: str, workers: int) -> int:
    """All rows of a table; how many are kept."""
    recipe = photos().replace(duplicates=Duplicates(perceptual=None))  # which the script does not look for
    recipe.optional = ()
    return funnel(curate(Table.open(place), recipe, workers=workers))["kept"]


def made(paths: list[Path], place: Path) -> str:
    samples = (dirty.Sample(path.name, path.read_bytes(), "drawn for a measurement") for path in paths)
    Table.create(place, (batch for sample in samples for batch in dirty.rows([sample])))
    return str(place)


def timed(function: Callable[[], int]) -> tuple[float, float, int]:
    """Seconds, seconds of processor time with that of processes which have ended, and the result."""
    start, spent = time.perf_counter(), sum(os.times()[:4])
    result = function()
    return time.perf_counter() - start, sum(os.times()[:4]) - spent, result


def peak(place: str) -> float:
    """MB at most of one process that curates a table."""
    command = [sys.executable, __file__, "--measure", place]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tenfold", action="store_true")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        ours(options.measure, 1)
        status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's, where that is larger
        print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024)
        return
    tables.ROWS = min(tables.ROWS, max(1, options.rows // (4 * options.workers)))  # a fragment is the least that a process gets
    # One for the pictures and one for each round, before Lance has threads, which a fork loses.
    pools = [multiprocessing.get_context("fork").Pool(options.workers) for _ in range(options.rounds + 1)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = options.pictures or folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        with pools.pop() as pool:
            paths = fill(pictures, options.rows, pool)
        ratios, cpu_ratios, rates = [], [], []
        for number in range(options.rounds):
            place = made(paths, folder / f"{number}.lance")
            with pools.pop() as pool:
                mine, mine_cpu, kept = timed(partial(ours, place, options.workers))
                theirs, their_cpu, also = timed(partial(script, paths, folder / "script.jsonl", pool))
            shutil.rmtree(place)
            ratios.append(theirs / mine)
            cpu_ratios.append(their_cpu / mine_cpu)
            rates.append(len(paths) / mine)
        result: dict[str, object] = {"rows": len(paths), "workers": options.workers, "kept": kept, "kept_by_script": also}
        result |= {"curate_ratio": statistics.median(ratios), "curate_cpu_ratio": statistics.median(cpu_ratios)}
        result |= {"rows_per_second": statistics.median(rates)}
        if options.tenfold:
            few = made(paths[: max(1, len(paths) // 10)], folder / "few.lance")
            many = made(paths, folder / "many.lance")
            result["peak_mb"] = {"1x": peak(few), "10x": peak(many)}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
