"""Where it fits: any folder of images as a `Source` for training, through a table in the cache.

In: a folder; what is searched and how captions are found, `data.survey` says. Out: batches of squares cut from the middle of the images,
and the list of what could not be used.
How: the files go to a table in the user's cache once, which is found again as long as no file changes. Small sets are decoded at the
start and stay in memory; of others, pictures are read when they are asked for (`data.rows`).
Gotchas: the table holds a copy of the files. Decoders of JPEG differ by a grey level now and then: the split of a small set is the same on
machines with the same version of Pillow, and on all machines if the images are PNG.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from mezzotint import config
from mezzotint.data.batch import Batch
from mezzotint.data.decode import UnusableError, square
from mezzotint.data.rows import CAPTIONS, MEMORY, Row, Rows, TableConfig, check
from mezzotint.data.sources import as_row, of_folder
from mezzotint.data.survey import SUFFIXES, Bad, Contents, identity, reasons, refusal, survey
from mezzotint.data.table import Table, is_table, schema
from mezzotint.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = min(4, os.cpu_count() or 1)
CHUNK = 64  # images in flight, which bounds the memory beside the result
PROGRESS_FROM = 200  # images
READING = 2  # raised when rows are made of files in another way


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
    """The images of a folder. They are kept in memory if they take no more than `MEMORY`: N * 3 * size * size bytes for N images.

    An image is turned upright (EXIF), laid over white where it is transparent, resized until its shorter side is `size`
    (antialiased; smaller images are enlarged), and cut to the square in the middle. On which side of the split it falls is a function
    of those pixels alone, or of the file's bytes in a set that is not kept in memory: copies fall on the same side, and other files do
    not matter, except that of two or more different pictures at least one is held out and at least one trained on.

    ids: relative paths of the usable images, sorted. captions: the variants of each, () where there is none.
    bad: what was set aside. version: a digest of names, pixels (or bytes) and captions.
    Raises `UserError` if the folder cannot be read, holds no usable image, or too large a share of it is bad.
    """

    def __init__(self, config: FolderConfig) -> None:
        self.config = config
        settings = TableConfig(
            config.path, "1", config.size, flip=config.flip, held_out=config.held_out, max_bad=config.max_bad, seed=config.seed
        )
        check(settings)
        contents = survey(config.path)
        names = sorted(name for name in contents.files if name.lower().endswith(SUFFIXES) or name in contents.captions)
        if not names:
            raise UserError(f"no image in {config.path!r}; choose a folder with files that end in {', '.join(SUFFIXES[:5])} or the like")
        table, self._in_use = _kept(contents, names)
        found = _looked_into(table, {identity(name): name for name in names}, config.size)
        self.bad = contents.bad + found.bad
        usable = np.flatnonzero(found.usable)
        self.ids = [found.names[row] for row in usable]
        self.captions = [found.captions[row] for row in usable]
        if not self.ids or len(self.bad) > config.max_bad * (len(self.bad) + len(self.ids)):
            raise refusal(config.path, self.bad, len(self.ids))
        contained = zip(self.ids, (found.digests[row].hex() for row in usable), self.captions, strict=True)
        self.version = hashlib.sha256(json.dumps(list(contained)).encode()).hexdigest()[:16]
        leading = np.array([int.from_bytes(digest[:8], "big") for digest in found.digests], dtype=np.uint64)
        self.rows = Rows(table, settings, found.usable, leading, found.known)
        self.rows.bad, self.workers = self.bad, self.rows.workers

    def __len__(self) -> int:
        """The number of training images."""
        return len(self.rows)

    def batch(self, number: int, size: int) -> Batch:
        """See `Rows.batch`. Images are (size, 3, side, side)."""
        return self.rows.batch(number, size)

    def read(self, number: int, size: int) -> Batch:
        """See `Rows.read`."""
        return self.rows.read(number, size)

    def span(self, start: int, stop: int) -> Batch:
        """See `Rows.span`."""
        return self.rows.span(start, stop)

    def held_out(self, size: int) -> Batch:
        """The first `size` held-out images, or as many as there are, in an order that is a function of their pixels.

        Each comes with the first variant of its caption.
        """
        return self.rows.held_out(size)

    def report(self) -> str:
        """A few lines for a person: how many images are used, held out, without a caption, and set aside for which reasons."""
        side, plain = self.config.size, sum(not captions for captions in self.captions)
        lines = [
            f"{len(self.ids):,} images from {self.config.path!r}, as {side} x {side} pixels",
            f"{len(self):,} to train on, {len(self.ids) - len(self):,} held out",
            f"{plain:,} without a caption",
        ]
        return "\n".join(lines + reasons(self.bad))


# From files to a table.


def _kept(contents: Contents, names: Sequence[str]) -> tuple[Table, IO[str]]:
    """The table of a folder's images, in the order of their names, and a lock that keeps it from being removed as long as it is open.

    It is made where the cache has none for the files as they are; those of the same folder as it was go then, unless they are in use.
    """
    place = _place(contents)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        making = open(place.parent / "making.lock", "w")  # noqa: SIM115  # closed below, which also ends the lock
    except OSError as error:
        raise UserError(f"cannot write to the cache {place.parent}: {error.strerror}; choose another with XDG_CACHE_HOME") from error
    with making:
        fcntl.flock(making, fcntl.LOCK_EX)  # of ranks that start together, one makes it
        if not is_table(place):
            part = place.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            Table.create(part, _rows(contents, names))
            part.rename(place)
            _remove_others(place)
        reading = open(place.with_suffix(".lock"), "w")  # noqa: SIM115  # the caller's
        fcntl.flock(reading, fcntl.LOCK_SH)
    return Table.open(place, 1), reading


def _remove_others(place: Path) -> None:
    """Remove what lies beside a table and nobody reads."""
    for other in place.parent.iterdir():
        if other.suffix in (".lance", ".part") and other != place:
            with open(other.with_suffix(".lock"), "w") as reading, suppress(BlockingIOError):
                fcntl.flock(reading, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)


def _place(contents: Contents) -> Path:
    """Where the table of a folder lies, as long as no file in it changes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint" / "folders"
    seen = [(name, why, *_state(contents.root / name)) for name, why in sorted(contents.files.items())]
    digest = hashlib.sha256(repr((READING, seen, contents.bad)).encode()).hexdigest()
    return cache / hashlib.sha256(os.fsencode(contents.root)).hexdigest()[:16] / f"{digest[:16]}.lance"


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does: size and the times of its content and of its permissions."""
    try:
        found = os.stat(path)
    except OSError:  # a link to nothing
        found = os.lstat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _rows(contents: Contents, names: Sequence[str]) -> "Iterator[pa.RecordBatch]":
    """Rows of the images."""
    import pyarrow as pa

    for start in range(0, len(names), CHUNK):
        yield pa.RecordBatch.from_pylist([as_row(of_folder(contents, name)) for name in names[start : start + CHUNK]], schema=schema())


# From the table to pictures.


@dataclass
class _Found:
    """Of every row: its file's name, captions, whether it is usable, and a digest of its pixels, or of the file; what is not usable.

    known: the pictures that stay in memory; None where they would be too many.
    """

    names: list[str]
    captions: list[tuple[str, ...]]
    usable: NDArray[np.bool_]
    digests: list[bytes]
    bad: list[Bad]
    known: dict[int, Row] | None


def _looked_into(table: Table, files: dict[str, str], size: int) -> _Found:
    """What is in a table of files, by their ids. Pictures that are to stay in memory are decoded, with a progress bar if there are many."""
    small = table.read(["id", CAPTIONS, "fault", "sha256"])
    names = [files[name] for name in small["id"].to_pylist()]
    faults = small["fault"].to_pylist()
    digests = [bytes.fromhex(digest) for digest in small["sha256"].to_pylist()]
    captions = [tuple(texts) for texts in small[CAPTIONS].to_pylist()]
    known: dict[int, Row] | None = None
    if len(table) * 3 * size**2 <= MEMORY:
        known = {}
        contents = (batch["content"].to_pylist() for batch in table.batches(["content"], CHUNK))
        for row, pixels in enumerate(squares(contents, len(table), size)):
            if isinstance(pixels, str):
                faults[row] = faults[row] or pixels
            else:
                digests[row] = hashlib.sha256(pixels.tobytes()).digest()
                known[row] = Row(names[row], {CAPTIONS: list(captions[row])}, None, pixels=pixels.transpose(1, 2, 0))
    bad = [Bad(name, fault) for name, fault in zip(names, faults, strict=True) if fault]
    return _Found(names, captions, np.array([not fault for fault in faults]), digests, bad, known)


def squares(chunks: Iterable[Sequence[Path | bytes | None]], total: int, size: int) -> Iterator[NDArray[np.uint8] | str]:
    """(3, size, size) of every picture, or why it cannot be decoded; with a progress bar if there are many. A chunk is in flight."""

    def decoded(content: Path | bytes | None) -> NDArray[np.uint8] | str:
        try:
            return "no content" if content is None else square(content, size)
        except UnusableError as error:
            return str(error)

    console = Console(stderr=True)
    silent = total <= PROGRESS_FROM or not console.is_terminal
    with ThreadPoolExecutor(THREADS) as pool:
        pictures = (picture for chunk in chunks for picture in pool.map(decoded, chunk))
        yield from track(pictures, "reading images", total=total, console=console, transient=True, disable=silent)
