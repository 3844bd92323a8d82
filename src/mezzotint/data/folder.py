"""Where it fits: any folder of images as a `Source` for training.

In: a folder, searched with its subfolders. Captions follow the image-folder convention: `metadata.jsonl` or `metadata.csv` in
the folder with columns `file_name` (relative to the folder) and `text`, several rows for one image being variants of its
caption; an image without a `text` there takes its variants from the non-empty lines of `name.txt` beside `name.png`.
Out: batches of squares cut from the middle of the images, and the list of what could not be used, with reasons.
Gotchas: files and folders whose names begin with a dot are not read, nor is anything that a link places outside the folder.
Decoders of JPEG differ by a grey level now and then: the split is the same on machines with the same version of Pillow, and on all
machines if the images are PNG.
"""

import hashlib
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mezzotint import config
from mezzotint.data.batch import Batch
from mezzotint.data.decode import UnusableError, square
from mezzotint.data.survey import SUFFIXES, Bad, Contents, sidecar, survey
from mezzotint.errors import UserError

THREADS = min(4, os.cpu_count() or 1)
CHUNK = 1024  # images in flight, which bounds the memory beside the result
PROGRESS_FROM = 200  # images


@dataclass
class FolderConfig(config.Config, kind="folder"):
    """A folder of images.

    path: the folder.
    size: side of the square pictures, in pixels.
    held_out: share of the images kept out of training.
    max_bad: the share of files and rows set aside above which the folder is refused.
    flip: mirror half of the training pictures, left to right.
    seed: of the order, the caption variants and the flips; the split does not depend on it.
    """

    path: str
    size: int = 32
    held_out: float = 0.05
    max_bad: float = 0.1
    flip: bool = False
    seed: int = 0

    def build(self) -> "Folder":
        return Folder(self)


class Folder:
    """The images of a folder, decoded once and kept in memory: N * 3 * size * size bytes for N images.

    An image is turned upright (EXIF), laid over white where it is transparent, resized until its shorter side is `size`
    (Lanczos' filter, antialiased; smaller images are enlarged), and cut to the square in the middle. On which side of the split
    it falls is a function of those pixels alone: copies fall on the same side, and other files do not matter, except that of
    two or more different pictures at least one is held out and at least one trained on.

    ids: relative paths of the usable images, sorted. captions: the variants of each, () where there is none.
    bad: what was set aside. version: a digest of names, pixels and captions.
    Raises `UserError` if the folder cannot be read, holds no usable image, or too large a share of it is bad.
    """

    def __init__(self, config: FolderConfig) -> None:
        _check(config)
        self.config = config
        contents = survey(config.path)
        names = sorted(name for name in contents.files if name.lower().endswith(SUFFIXES) or name in contents.captions)
        if not names:
            raise UserError(f"no image in {config.path!r}; choose a folder with files that end in {', '.join(SUFFIXES[:5])} or the like")
        read = _read_all(contents, names, config.size)
        self.bad = contents.bad + read.bad
        self.ids, self.captions, self._pixels = read.ids, read.captions, read.pixels
        if not self.ids or len(self.bad) > config.max_bad * (len(self.bad) + len(self.ids)):
            raise self._refusal()
        self._training, self._held_out = _split(read.digests, config.held_out)
        contained = zip(self.ids, (digest.hex() for digest in read.digests), self.captions, strict=True)
        self.version = hashlib.sha256(json.dumps(list(contained)).encode()).hexdigest()[:16]
        self._permutation: Callable[[int], Tensor] = lru_cache(maxsize=2)(self._draw_permutation)

    def __len__(self) -> int:
        """The number of training images."""
        return len(self._training)

    def batch(self, number: int, size: int) -> Batch:
        """Positions number * size to (number + 1) * size of the training stream, which is one permutation after another.

        Images are (size, 3, side, side). Which variant of the caption is used, and whether the picture is flipped, is a
        function of the seed and the position.
        """
        positions = range(number * size, (number + 1) * size)
        chosen = self._stream(positions)
        draws = [random.Random(f"{self.config.seed} sample {position}") for position in positions]
        variants = [self.captions[i] or ("",) for i in chosen.tolist()]
        prompts = [draw.choice(captions) for draw, captions in zip(draws, variants, strict=True)]
        batch = self._batch(chosen, prompts)
        if self.config.flip:
            flipped = torch.tensor([draw.random() < 0.5 for draw in draws])
            batch.images[flipped] = batch.images[flipped].flip(3)
        return batch

    def held_out(self, size: int) -> Batch:
        """The first `size` held-out images, or as many as there are, in an order that is a function of their pixels.

        Each comes with the first variant of its caption.
        """
        chosen = self._held_out[:size]
        return self._batch(chosen, [self.captions[i][0] if self.captions[i] else "" for i in chosen.tolist()])

    def report(self) -> str:
        """A few lines for a person: how many images are used, held out, without a caption, and set aside for which reasons."""
        side, plain = self.config.size, sum(not captions for captions in self.captions)
        lines = [
            f"{len(self.ids):,} images from {self.config.path!r}, as {side} x {side} pixels",
            f"{len(self):,} to train on, {len(self._held_out):,} held out",
            f"{plain:,} without a caption",
            f"{len(self.bad):,} set aside",
        ]
        kinds = Counter(bad.reason.partition(":")[0] for bad in self.bad)
        first = {bad.reason.partition(":")[0]: bad.file for bad in reversed(self.bad)}
        lines += [f"  {count:,} {kind} (first: {first[kind]!r})" for kind, count in kinds.most_common(4)]
        return "\n".join(lines)

    def write_bad(self, path: str | Path) -> None:
        """Write what was set aside as JSON lines with `file` and `reason`."""
        Path(path).write_text("".join(json.dumps(asdict(bad)) + "\n" for bad in self.bad), encoding="utf-8")

    def _stream(self, positions: range) -> Tensor:
        """Which images stand at these positions of the training stream, as indices into `ids`."""
        count = len(self)
        epochs = range(positions.start // count, (positions.stop - 1) // count + 1)
        parts = [self._permutation(e)[max(positions.start - e * count, 0) : positions.stop - e * count] for e in epochs]
        return self._training[torch.cat(parts)]

    def _draw_permutation(self, epoch: int) -> Tensor:
        seed = random.Random(f"{self.config.seed} epoch {epoch}").getrandbits(63)
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def _batch(self, chosen: Tensor, prompts: list[str]) -> Batch:
        images = self._pixels[chosen].float().div_(127.5).sub_(1)
        return Batch(images, prompts, [self.ids[i] for i in chosen.tolist()])

    def _refusal(self) -> UserError:
        total, worst = len(self.bad) + len(self.ids), self.bad[0]
        with tempfile.NamedTemporaryFile(prefix="mezzotint-bad-", suffix=".jsonl", delete=False) as file:
            listing = file.name
        self.write_bad(listing)
        raising = f", or go on without them with max_bad above {len(self.bad) / total:.3f}" if self.ids else ""
        return UserError(
            f"{len(self.bad)} of {total} files and rows in {self.config.path!r} cannot be used, the first being {worst.file!r} "
            f"({worst.reason}); mend or remove what {listing} lists{raising}"
        )


def _check(config: FolderConfig) -> None:
    if config.size < 1:
        raise UserError(f"size must be at least 1 pixel, not {config.size}")
    if not 0 <= config.held_out < 1:
        raise UserError(f"held_out is a share, from 0 to below 1, not {config.held_out}")
    if not 0 <= config.max_bad <= 1:
        raise UserError(f"max_bad is a share, from 0 to 1, not {config.max_bad}")


def _split(digests: Sequence[bytes], share: float) -> tuple[Tensor, Tensor]:
    """Indices of the training images, ascending, and of the held-out ones, in the order of their digests.

    Digests are uniform, so those below `share` of their range are about that share of the distinct pictures.
    """
    distinct = sorted(set(digests))
    below = sum(int.from_bytes(digest[:8], "big") < share * 2**64 for digest in distinct)
    held = set(distinct[: min(max(below, 1), len(distinct) - 1)])
    order = sorted(range(len(digests)), key=lambda i: digests[i])
    training = [i for i, digest in enumerate(digests) if digest not in held]
    return torch.tensor(training), torch.tensor([i for i in order if digests[i] in held], dtype=torch.long)


# From names to pixels.


@dataclass
class _Picture:
    name: str
    pixels: NDArray[np.uint8]  # (3, size, size)
    digest: bytes
    captions: tuple[str, ...]


@dataclass
class _Pictures:
    """The usable images, pixels (N, 3, size, size) uint8, and what was set aside."""

    pixels: Tensor
    ids: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def _read_all(contents: Contents, names: Sequence[str], size: int) -> _Pictures:
    """Read the images, in the order of `names`, with a few threads and a progress bar if there are many."""
    read = _Pictures(torch.empty(len(names), 3, size, size, dtype=torch.uint8))
    with ThreadPoolExecutor(THREADS) as pool:
        chunks = (names[i : i + CHUNK] for i in range(0, len(names), CHUNK))
        pictures = (picture for chunk in chunks for picture in pool.map(partial(_read, contents, size), chunk))
        console = Console(stderr=True)
        silent = len(names) <= PROGRESS_FROM or not console.is_terminal
        for picture in track(pictures, "reading images", total=len(names), console=console, transient=True, disable=silent):
            if isinstance(picture, Bad):
                read.bad.append(picture)
            else:
                read.pixels[len(read.ids)] = torch.from_numpy(picture.pixels)
                read.ids.append(picture.name)
                read.captions.append(picture.captions)
                read.digests.append(picture.digest)
    read.pixels = read.pixels[: len(read.ids)]
    return read


def _read(contents: Contents, size: int, name: str) -> _Picture | Bad:
    """An image with its captions, or why it cannot be used."""
    reason = contents.files[name] or contents.faults.get(name)
    if reason:
        return Bad(name, reason)
    try:
        captions = tuple(contents.captions.get(name, ())) or sidecar(contents, name)
        pixels = square(contents.root / name, size)
    except UnusableError as error:
        return Bad(name, str(error))
    return _Picture(name, pixels, hashlib.sha256(pixels.tobytes()).digest(), captions)
