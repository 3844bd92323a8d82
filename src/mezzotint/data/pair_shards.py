"""Where it fits: preference pairs in Parquet as a `Source`, in the columns that Pick-a-Pic v2 has (Kirstain et al. 2023).

In: a folder of shards, whose rows have the columns `jpg_0` and `jpg_1`, files of pictures, `label_0` and `label_1`, the greater of which is
the winner's, and `caption`. Out: batches of squares cut from the middle, the losers as `Batch.rejected`, and the list of what could not be
used, ties among it.
How: of all rows only labels and captions are read, once. Pictures are read when they are asked for, a row group at once, since Parquet has
no smaller piece; an epoch shuffles the row groups, and rows among the `NEAR` that follow each other, so that a piece serves many batches.
Gotchas: pairs are held out by their captions, as reward models hold them out. A pair that cannot be decoded is replaced by the next one of
training, which is a function of the shards alone: a batch is the same whenever it is read.
"""

import hashlib
import os
import random
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.data.decode import UnusableError, square
from mezzotint.data.order import Stream, leading, split
from mezzotint.data.rows import MOST_WORKERS, TableConfig, check
from mezzotint.data.sources import shards
from mezzotint.data.survey import Bad, reasons, refusal
from mezzotint.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from mezzotint.data.preferences import PreferencesConfig

PICTURES, LABELS, CAPTION = ("jpg_0", "jpg_1"), ("label_0", "label_1"), "caption"
ENDING = ".parquet"
NEAR = 4  # row groups whose rows are shuffled together; twice as many stay in memory, as the files that they are
TIE = "a tie"


@dataclass(frozen=True)
class Group:
    """A row group of the shard at a path. first: the number of its first row in the shard."""

    shard: str
    path: Path
    number: int
    first: int


@dataclass
class Index:
    """What is known of the shards of a folder before any picture is read.

    Of every usable pair: the number of its group, its row within that, whether its second picture is the winner, and its caption. bad: what
    was set aside. digest: of all that, and of the sizes of the shards.
    """

    groups: list[Group] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    second: list[bool] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def name(self, pair: int) -> str:
        """What a pair is called."""
        group = self.groups[self.group[pair]]
        return f"{group.shard}:{group.first + self.row[pair]}"

    def split_by(self) -> list[str]:
        """What pairs are split by."""
        words = [" ".join(caption.lower().split()) for caption in self.captions]
        return words if len(set(words)) > 1 else [self.name(pair) for pair in range(len(words))]


class NearStream(Stream):
    """A `Stream` whose neighbours are of few groups. groups: (N,) of the members, 0, 1, ..."""

    def __init__(self, members: Tensor, groups: Tensor, name: str) -> None:
        super().__init__(members, name)
        self.groups = groups

    def _draw(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(random.Random(f"{self.name} epoch {epoch}").getrandbits(63))
        window = torch.randperm(int(self.groups.max()) + 1, generator=generator) // NEAR
        return (window[self.groups] + torch.rand(len(self.members), dtype=torch.float64, generator=generator)).argsort()


class PairShards:
    """A `Stored` source: the pairs of a folder of Parquet that are no ties, all of them once in every epoch.

    A pair is called "SHARD:ROW". On which side of the split it falls is a function of its caption's words, or of its name where all
    captions are the same. bad: what was set aside; ties are listed and do not count towards `max_bad`. version: a digest of the shards'
    names and sizes, labels and captions.
    Raises `UserError` if the folder cannot be read, holds fewer than two usable pairs that differ, or too large a share of it is bad.
    """

    def __init__(self, config: "PreferencesConfig") -> None:
        check(TableConfig(config.path, size=config.size, held_out=config.held_out, max_bad=config.max_bad))
        self.config, self.index, self.workers = config, indexed(config.path), min(MOST_WORKERS, os.cpu_count() or 1)
        self.bad, self.version, total = self.index.bad, self.index.digest.hexdigest()[:16], len(self.index.row)
        if len(faults := [bad for bad in self.bad if not bad.reason.startswith(TIE)]) > config.max_bad * (len(faults) + total):
            raise refusal(config.path, faults, total)
        digests = [hashlib.sha256(key.encode()).hexdigest() for key in self.index.split_by()]
        self.training, self._held_out = split(leading(digests), config.held_out)
        if not len(self._held_out):
            raise UserError(f"{config.path!r} has {total} usable pairs; give two or more that differ, since some are held out")
        self._stream = NearStream(self.training, torch.tensor(self.index.group)[self.training], str(config.seed))
        self._lock, self._faulty = threading.Lock(), set[int]()
        self._files: OrderedDict[int, list[dict[str, bytes | None]]] = OrderedDict()
        self._seen = lru_cache(maxsize=1)(self._first)

    def __len__(self) -> int:
        """The number of training pairs."""
        return len(self.training)

    def batch(self, number: int, size: int) -> Batch:
        """Positions number * size to (number + 1) * size of the training stream."""
        return self.read(number, size).scaled()

    def read(self, number: int, size: int) -> Batch:
        """As `batch`, in any thread, with pictures 0..255."""
        with self._lock:  # else threads that come to a new epoch together would each shuffle it
            pairs = self._stream.at(torch.arange(number * size, (number + 1) * size)).tolist()
        return self._batch([self._sound(pair) for pair in pairs])

    def held_out(self, size: int) -> Batch:
        """The first `size` held-out pairs, or as many as there are, in an order that is a function of what they are split by.

        Those that cannot be decoded are left out. The newest ones that were asked for stay in memory.
        """
        return self._seen(size).scaled()

    def report(self) -> str:
        """A few lines for a person: how many pairs are used, held out, without a caption, and set aside for which reasons."""
        side, plain = self.config.size, sum(not caption for caption in self.index.captions)
        lines = [
            f"{len(self.index.row):,} preference pairs from {self.config.path!r}, as {side} x {side} pixels",
            f"{len(self):,} to train on, {len(self._held_out):,} held out",
            f"{plain:,} without a caption",
        ]
        return "\n".join(lines + reasons(self.bad))

    def _first(self, size: int) -> Batch:
        found: list[tuple[int, NDArray[np.uint8]]] = []
        for pair in self._held_out.tolist():
            if len(found) >= size:
                break
            try:
                found.append((pair, self._pair(pair)))
            except UnusableError as error:
                self._set_aside(pair, str(error))
        return self._batch(found)

    def _sound(self, pair: int) -> tuple[int, NDArray[np.uint8]]:
        """A training pair; where it cannot be decoded, the next one that can."""
        for _ in range(len(self)):
            try:
                return pair, self._pair(pair)
            except UnusableError as error:
                self._set_aside(pair, str(error))
            pair = int(self.training[int(torch.searchsorted(self.training, pair, right=True)) % len(self)])
        raise UserError(f"no pair of {self.config.path!r} can be decoded; fetch its shards again")

    def _pair(self, pair: int) -> NDArray[np.uint8]:
        """(2, 3, size, size): the winner and the loser. UnusableError where one cannot be decoded."""
        files = self._group(self.index.group[pair])[self.index.row[pair]]
        pictures = []
        for column in PICTURES[::-1] if self.index.second[pair] else PICTURES:
            try:
                pictures.append(square(files[column] or b"", self.config.size))
            except UnusableError as error:
                raise UnusableError(f"unusable picture: {column}: {error}") from error
        return np.stack(pictures)

    def _group(self, number: int) -> list[dict[str, bytes | None]]:
        """The files of the pictures of a row group, from memory or the disk. UserError where the shard is no longer what it was."""
        from pyarrow import ArrowException
        from pyarrow import parquet as pq

        with self._lock:
            if number not in self._files:
                group = self.index.groups[number]
                try:
                    with pq.ParquetFile(group.path) as file:
                        self._files[number] = file.read_row_group(group.number, list(PICTURES)).to_pylist()
                except (ArrowException, OSError) as error:
                    raise UserError(
                        f"{group.shard!r} of {self.config.path!r} can no longer be read ({error}); put it back, and go on"
                    ) from error
                if len(self._files) > 2 * NEAR:
                    self._files.popitem(last=False)
            self._files.move_to_end(number)
            return self._files[number]

    def _set_aside(self, pair: int, reason: str) -> None:
        """Note a pair that cannot be decoded. UserError where there are too many."""
        with self._lock:
            if pair in self._faulty:
                return
            self._faulty.add(pair)
            self.bad.append(Bad(self.index.name(pair), reason))
        count, total = len(self._faulty), len(self.index.row)
        if count > self.config.max_bad * total:
            raise UserError(
                f"{count} of {total} pairs of {self.config.path!r} cannot be decoded, the last being {self.index.name(pair)!r} ({reason}); "
                f"fetch the shards again, or go on without them with max_bad of {count / total:.3g} or more"
            )

    def _batch(self, found: Sequence[tuple[int, NDArray[np.uint8]]]) -> Batch:
        side = self.config.size
        pictures = torch.from_numpy(np.array([pictures for _, pictures in found], dtype=np.uint8).reshape(-1, 2, 3, side, side))
        captions, names = [self.index.captions[pair] for pair, _ in found], [self.index.name(pair) for pair, _ in found]
        return Batch(pictures[:, 0], captions, names, pictures[:, 1])


def indexed(path: str) -> Index:
    """Labels and captions of all shards of a folder. UserError for shards whose columns are not those of pairs."""
    index = Index()
    for name, place in shards(path, (ENDING,)):
        if isinstance(place, Path):
            _add(index, name, place)
        elif name.endswith(ENDING):
            index.bad.append(Bad(name, place))
    return index


def _add(index: Index, name: str, path: Path) -> None:
    """The row groups of a shard, as far as it can be read."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    first = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, name)
            index.digest.update(f"{name} {path.stat().st_size} {file.metadata.num_rows}".encode())
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, [*LABELS, CAPTION])
                labels = np.stack([table[column].cast(pa.float64()).to_numpy() for column in LABELS])
                captions = [(caption or "").strip() for caption in table[CAPTION].to_pylist()]
                index.groups.append(Group(name, path, number, first))
                _add_group(index, labels, captions)
                first += len(captions)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        index.bad.append(Bad(name, f"damaged table: {' '.join(str(error).split())[:200]}; what follows row {first:,} is lost"))


def _add_group(index: Index, labels: NDArray[np.float64], captions: list[str]) -> None:
    """The rows of the newest group, from their labels (2, N) and captions. Those without a winner are set aside."""
    index.digest.update(labels.tobytes() + repr(captions).encode())
    group = index.groups[-1]
    missing, tied = np.isnan(labels[0] + labels[1]), np.equal(labels[0], labels[1])
    for row in np.flatnonzero(missing | tied).tolist():
        reason = "unreadable row: a label is missing" if missing[row] else f"{TIE}: both labels are {float(labels[0, row]):g}"
        index.bad.append(Bad(f"{group.shard}:{group.first + row}", reason))
    usable = np.flatnonzero(~(missing | tied)).tolist()
    index.group += [len(index.groups) - 1] * len(usable)
    index.row += usable
    index.second += [bool(labels[1, row] > labels[0, row]) for row in usable]
    index.captions += [captions[row] for row in usable]


def _check_columns(schema: "pa.Schema", name: str) -> None:
    import pyarrow as pa

    files, numbers, words = ("is_binary", "is_large_binary"), ("is_floating", "is_integer"), ("is_string", "is_large_string")
    wanted = {**dict.fromkeys(PICTURES, files), **dict.fromkeys(LABELS, numbers), CAPTION: words}
    for column, kinds in wanted.items():
        if column not in schema.names:
            raise UserError(f"{name!r} has no column {column!r}; shards of pairs have {', '.join(wanted)}")
        found = schema.field(column).type
        if not any(getattr(pa.types, kind)(found) for kind in kinds):
            raise UserError(f"column {column!r} of {name!r} is {found}; pictures are binary, labels numbers, captions strings")


def holds_pairs(path: str | Path) -> bool:
    """Whether the first shard in a folder or its subfolders, if there is any, has the columns of pairs. UserError without pyarrow."""
    root = Path(path)
    shard = next((place for pattern in ("*", "*/*") for place in sorted(root.glob(pattern + ENDING))), None)
    if shard is None:
        return False
    try:
        import pyarrow as pa
        from pyarrow import parquet as pq
    except ImportError:
        raise UserError("pairs in Parquet need more packages; install them with: pip install 'mezzotint[data]'") from None
    try:
        return {*PICTURES, *LABELS} <= set(pq.read_schema(shard).names)
    except (pa.ArrowException, OSError):
        return False
