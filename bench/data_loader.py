"""How fast a table becomes batches: decoded, resized to a square and collated, beside the ways that others have.

`loader_ratio.PEER`  samples a second of ours over those of the peer, median over rounds in which both are timed, one after the other.
    torch        `torch.utils.data.DataLoader` over a folder of files, as torchvision's ImageFolder reads them: Pillow, resize, centre crop.
    webdataset   WebDataset over a tar, with its own decoder to Pillow, shuffled in a buffer.
    datasets     Hugging Face's `datasets` over Parquet with an image column, shuffled by rows, in the same DataLoader.
Everybody reads the same JPEG files from the page cache, shuffled, with the same number of workers (threads here, processes there), cuts the
same square by the same filter, and ends with (B, 3, H, W) uint8 on the host. Starting workers and the first batch are not counted.
`core_ratio.PEER`    the same of the time that cores work for a sample: what is left of it where other work runs on the machine.
`epoch_start_ms`     from opening the table to the first batch, beside it.

    python bench/data_loader.py [--only torch] [--images 256] [--size 256] [--workers 2] [--rounds 7]
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from mezzotint.data import table as tables
from mezzotint.data.batch import Loader
from mezzotint.data.rows import TableConfig
from mezzotint.data.table import Table

SIDES = (256, 513)  # of the files, in pixels, from and below
QUALITY = 90
BATCH = 32


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG file of noise whose power falls off with frequency as in photographs."""
    height, width = rng.integers(*SIDES, size=2)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    waves = (rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))) / frequency
    pixels = np.fft.irfft2(waves, s=(height, width)).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray((pixels / pixels.std() * 50 + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def squared(size: int, image: Image.Image) -> NDArray[np.uint8]:
    """Shorter side to `size`, then the middle, channels first: what torchvision's Resize, CenterCrop and PILToTensor do."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """Files in a folder, as ImageFolder has them."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with self.paths[number].open("rb") as file:
            return torch.from_numpy(np.ascontiguousarray(squared(self.size, Image.open(file))))


def shuffled(rows: Any, workers: int) -> Iterator[Any]:
    """Batches of rows in permutation after permutation. One sampler gives all of them: a small set has no pauses between its epochs."""
    sampler = torch.utils.data.RandomSampler(rows, num_samples=1 << 20)
    return iter(torch.utils.data.DataLoader(rows, BATCH, sampler=sampler, num_workers=workers))


def torch_peer(folder: Path, size: int, workers: int) -> Iterator[torch.Tensor]:
    files = Files(sorted((folder / "files").iterdir()), size)
    return shuffled(files, workers)


def _second(size: int, sample: tuple[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(squared(size, sample[0])))


def webdataset_peer(folder: Path, size: int, workers: int) -> Iterator[torch.Tensor]:
    import webdataset as wds

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = wds.WebDataset(shards, shardshuffle=False, resampled=True).shuffle(100).decode("pil").to_tuple("jpg")
    return iter(torch.utils.data.DataLoader(samples.map(partial(_second, size)), BATCH, num_workers=workers))


def _transformed(size: int, rows: dict[str, list[Image.Image]]) -> dict[str, list[torch.Tensor]]:
    return {"image": [torch.from_numpy(np.ascontiguousarray(squared(size, image))) for image in rows["image"]]}


def datasets_peer(folder: Path, size: int, workers: int) -> Iterator[torch.Tensor]:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "cache"))
    rows = rows.cast_column("image", datasets.Image()).with_transform(partial(_transformed, size))
    return (batch["image"] for batch in shuffled(rows, workers))


PEERS: dict[str, Callable[[Path, int, int], Iterator[torch.Tensor]]] = {
    "torch": torch_peer,
    "webdataset": webdataset_peer,
    "datasets": datasets_peer,
}


class Ours(Iterator[torch.Tensor]):
    """Batches of the loader as they come from its threads, before they are floats."""

    def __init__(self, folder: Path, size: int, workers: int) -> None:
        start = time.perf_counter()
        source = TableConfig(str(folder / "t.lance"), size=size, held_out=0.0, workers=workers).build()
        source._keeps = False  # pictures are decoded in every epoch, as if there were too many for the memory
        self.loader = Loader(source, BATCH)
        next(self)
        self.start = time.perf_counter() - start

    def __next__(self) -> torch.Tensor:
        number, self.loader.position = self.loader.position, self.loader.position + 1
        return self.loader._read(self.loader.source, number).images.contiguous()  # type: ignore[arg-type]


def write(folder: Path, images: int) -> None:
    """The same pictures as files, as tars, as Parquet and as a table."""
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    files = [photograph(rng) for _ in range(images)]
    (folder / "files").mkdir()
    names = [f"{number:06}.jpg" for number in range(images)]
    for name, file in zip(names, files, strict=True):
        (folder / "files" / name).write_bytes(file)
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for name in names[shard::4]:
                tar.add(folder / "files" / name, name)
    column = pa.table({"image": [{"bytes": file, "path": None} for file in files]})
    pyarrow.parquet.write_table(column, folder / "rows.parquet", row_group_size=64)
    plain = {"media": "image", "captions": ["a picture"], "width": 1, "height": 1, "format": "JPEG", "source": "here", "fault": ""}
    rows = [
        {"id": name, "content": file, "sha256": hashlib.sha256(file).hexdigest(), **plain} for name, file in zip(names, files, strict=True)
    ]
    Table.create(folder / "t.lance", [pa.RecordBatch.from_pylist(rows, schema=tables.schema())])


def worked() -> float:
    """Seconds of all cores that this process and its workers have used, where the system tells those of the workers (Linux)."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        with suppress(OSError):
            times = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            total += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return total


def seconds(batches: Iterator[torch.Tensor], number: int) -> tuple[float, float]:
    """How long so many batches take, and how long the cores work for them."""
    start, before = time.perf_counter(), worked()
    for _ in range(number):
        assert len(next(batches)) == BATCH
    return time.perf_counter() - start, worked() - before


def measure(folder: Path, peer: str, size: int, workers: int, rounds: int, batches: int) -> dict[str, float]:
    ours, theirs = Ours(folder, size, workers), PEERS[peer](folder, size, workers)
    took: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        for name, source in sorted({"ours": ours, "theirs": theirs}.items(), reverse=bool(turn % 2)):
            seconds(source, 3 * workers)  # what was read ahead meanwhile, and not counted
            took[name].append(seconds(source, batches))
    ours.loader.close()
    pairs = list(zip(took["ours"][1:], took["theirs"][1:], strict=True))
    return {
        f"loader_ratio.{peer}": statistics.median(theirs[0] / ours[0] for ours, theirs in pairs),
        f"core_ratio.{peer}": statistics.median(theirs[1] / ours[1] for ours, theirs in pairs),
        f"images_per_second.{peer}": BATCH * batches / statistics.median(theirs[0] for _, theirs in pairs),
        "images_per_second.ours": BATCH * batches / statistics.median(ours[0] for ours, _ in pairs),
        "epoch_start_ms": 1e3 * ours.start,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="lance is not fork-safe")  # the peers' processes do not use it
    result: dict[str, Any] = {name: vars(options)[name] for name in ("images", "size", "workers")}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options.images)
        for peer in options.only:
            result |= measure(Path(name), peer, options.size, options.workers, options.rounds, options.batches)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
