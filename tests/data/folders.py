"""Small folders of pictures, for the tests of folders as a source."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mezzotint.data.batch import Batch
from mezzotint.data.folder import Folder, FolderConfig

SIDE = 8


def paint(path: Path, seed: int) -> None:
    """A picture of coloured noise, different for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def fill(folder: Path, count: int) -> None:
    for seed in range(count):
        paint(folder / f"{seed:03}.png", seed)


def build(folder: Path, size: int = SIDE, held_out: float = 0.3, max_bad: float = 0.1, flip: bool = False, seed: int = 0) -> Folder:
    return FolderConfig(str(folder), size, held_out, max_bad, flip, seed).build()


def training_ids(folder: Folder) -> set[str]:
    return set(folder.batch(0, len(folder)).ids)


def held_out_ids(folder: Folder) -> set[str]:
    return set(folder.held_out(10**6).ids)


def captions(folder: Folder) -> dict[str, tuple[str, ...]]:
    return dict(zip(folder.ids, folder.captions, strict=True))


def equal(one: Batch, other: Batch) -> bool:
    return one.ids == other.ids and one.prompts == other.prompts and torch.equal(one.images, other.images)


def only_picture(folder: Path, size: int) -> torch.Tensor:
    """The only image of a folder, (3, size, size), 0..255."""
    source = build(folder, size)
    assert len(source) == 1
    return source.batch(0, 1).images[0].add(1).mul(127.5).round()
