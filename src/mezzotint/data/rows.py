"""Where it fits: a table as a `Source` for training.

In: a table at one version, and which of its rows, pictures and captions a run takes. Out: batches, read at random from the disk and
decoded when they are asked for, and a list of what could not be.
How: of all rows only a few small columns are read, once; what stands at a place of the stream is computed (`data.order`). So a run begins
at any place at once, and any number of ranks sees the same stream.
Gotchas: rows with a fault or a verdict, of owners who opted out, clips, and those that `where` leaves out are never read. A row that cannot
be decoded is replaced by the next one of its kind, which is a function of the table alone: a batch is the same whenever it is read.
"""

import hashlib
import os
import random
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mezzotint import config
from mezzotint.data import buckets, cache
from mezzotint.data.batch import Batch
from mezzotint.data.captions import choose
from mezzotint.data.decode import UnusableError, fitted
from mezzotint.data.order import Chosen, Order, leading, split
from mezzotint.data.survey import Bad
from mezzotint.data.table import Table
from mezzotint.errors import UserError
from mezzotint.models.cond import Cond
from mezzotint.pipeline import Pipeline
from mezzotint.weights.files import read_json

if TYPE_CHECKING:
    import pyarrow as pa

MEMORY = 1 << 30  # bytes: pictures that take no more altogether stay in memory once they are decoded
SMALL = ("sha256", "width", "height", "media", "opt_out", "fault")
VERDICT, REPEATS = "verdict", "repeats"  # columns that a table need not have
CAPTIONS = "captions"
MOST_WORKERS = 8  # unless more are asked for: each holds a batch in memory
CENTRE = (0.5, 0.5)


@dataclass
class TableConfig(config.Config, kind="table"):
    """Rows of a table.

    path: the table. version: its number, or the name of a snapshot; the newest if empty. A run stores the number, and goes on with it.
    size: side of the square pictures, in pixels. multiple: 0 for squares; else pictures have shapes of about that area (`data.buckets`),
    whose sides are multiples of it. where: a condition on columns, as in SQL, that rows must fulfil. captions: columns with captions and
    how often each is taken; the column `captions` alone if empty. crop: what is cut out. flip: mirror half of the training pictures, left
    to right. held_out: share of the rows kept out of training. max_bad: the share of rows that cannot be decoded
    above which the run ends. latents, states: columns of `curation.cache` that are taken in the place of pictures and with the prompts;
    none if empty. seed: of the order, captions, cuts and flips; the split does not depend on it. workers: threads that read, one for each
    core, but no more than `MOST_WORKERS`, if 0; no number depends on it.
    """

    path: str = ""
    version: str = ""
    size: int = 256
    multiple: int = 0
    where: str = ""
    captions: dict[str, float] = field(default_factory=dict)
    crop: Literal["centre", "random"] = "centre"
    flip: bool = False
    held_out: float = 0.01
    max_bad: float = 0.01
    latents: str = ""
    states: str = ""
    seed: int = 0
    workers: int = field(default=0, compare=False)

    def build(self) -> "Rows":
        return Rows(self.open(), self)

    def open(self) -> Table:
        """The table at the version."""
        return Table.open(self.path, int(self.version) if self.version.isdecimal() else self.version or None)

    def pinned(self, run: Path, part: str = "") -> "TableConfig":
        """The same with the number of the version: the one that the run in this folder began with, or what the newest is now.

        part: the name, where the table is one of a mixture.
        """
        stored = read_json(run / "config.json")["data"] if (run / "config.json").is_file() else {}
        stored = stored.get("parts", {}).get(part, {}) if part else stored
        if not self.version and stored.get("kind") == self.kind:
            return self.replace(version=stored["version"])
        return self.replace(version=str(self.open().version))


@dataclass
class Row:
    """A row as it was read. pixels: (H, W, 3) uint8 once they are there, and `content` is None then."""

    name: str
    captions: dict[str, list[str]]
    content: bytes | None
    latents: bytes | None = None
    states: bytes | None = None
    pixels: NDArray[np.uint8] | None = None


class Rows:
    """A `Stored` source: the rows of a table.

    usable: (N,) which rows may be taken. digests: (N,) of what is in them, of which the split is a function. known: rows that need not be
    read, by number. Folders give their own; else they are as the table says.
    UserError where the settings are impossible, and where no row is left.
    """

    def __init__(
        self,
        table: Table,
        config: TableConfig,
        usable: NDArray[np.bool_] | None = None,
        digests: NDArray[np.uint64] | None = None,
        known: dict[int, Row] | None = None,
    ) -> None:
        check(config)
        table.check([*config.captions, *filter(None, (config.latents, config.states))])
        self.table, self.config = table, config
        self.left_out: dict[str, int] = {}
        small = table.read([*SMALL, *(name for name in (VERDICT, REPEATS) if name in table.columns)])
        rows = np.flatnonzero(self._usable(small) if usable is None else usable)
        self.used = len(rows)
        if not len(rows):
            reasons = ", ".join(f"{count} left out: {why}" for why, count in self.left_out.items())
            raise UserError(f"no row of {config.path!r} can be trained on ({reasons or 'it is empty'}); look at its faults and verdicts")
        ours = leading(small["sha256"].take(rows).to_pylist()) if digests is None else digests[rows]
        self.training, self._held_out = (torch.from_numpy(rows)[side] for side in split(ours, config.held_out))
        if REPEATS in small.column_names:
            times = torch.tensor(small[REPEATS].fill_null(1).to_numpy())
            self.training = self.training.repeat_interleave(times[self.training])
        self.version = f"table {table.version} {hashlib.sha256(ours.tobytes()).hexdigest()[:16]}"
        self.shapes, assigned = self._bucketed(small, rows)
        self.order = Order(self.training, assigned, len(self.shapes), config.seed)
        self.workers = config.workers or min(MOST_WORKERS, os.cpu_count() or 1)
        self.bad: list[Bad] = []
        self._faulty: set[int] = set()
        self._known = {} if known is None else known
        fits = len(rows) * 3 * config.size**2 <= MEMORY and config.crop == "centre" and not config.latents
        self._keeps = fits or known is not None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of samples of an epoch."""
        return len(self.training)

    def batch(self, number: int, size: int) -> Batch:
        """Positions number * size to (number + 1) * size of the training stream.

        Which caption is used, what is cut out, and whether the picture is flipped, is a function of the seed and the position.
        """
        return self.read(number, size).scaled()

    def read(self, number: int, size: int) -> Batch:
        """As `batch`, in any thread, with images 0..255."""
        with self._lock:  # else threads that come to a new epoch together would each shuffle it
            chosen = self.order.batch(number, size)
        return self._batch(chosen, number * size)

    def span(self, start: int, stop: int) -> Batch:
        """Positions from `start` to before `stop` of the stream of squares, as `read`."""
        with self._lock:
            chosen = self.order.span(start, stop)
        return self._batch(chosen, start)

    def held_out(self, size: int) -> Batch:
        """The first `size` held-out rows, or as many as there are, in an order that is a function of what is in them.

        Pictures are squares whatever the buckets; latents are those of the bucket that most have. Each comes with the first variant of the
        caption that is most frequent. Rows that cannot be decoded are left out.
        """
        shape, rows = (self.config.size, self.config.size), self._held_out
        if self.config.latents and len(rows):
            assigned = self.order.assigned[rows]
            rows = rows[assigned == assigned.mode().values]
        samples: list[_Sample] = []
        for start in range(0, len(rows), max(1, size)):
            if len(samples) >= size:
                break
            part = rows[start : start + size].tolist()
            there = self._read(part)
            for row in part:
                try:
                    samples.append(self._sample(there[row], row, shape, None))
                except UnusableError as error:
                    self._set_aside(row, there[row].name, str(error))
        return _collated(samples[:size], shape).scaled()

    def check(self, pipeline: Pipeline) -> None:
        """UserError where columns of latents or states are not what the parts of a pipeline would make."""
        if self.config.latents:
            cache.check_latents(self.table, self.config.latents, pipeline, self.config.size, self.config.multiple)
        if self.config.states:
            cache.check_states(self.table, self.config.states, pipeline, list(self.config.captions) or [CAPTIONS])

    def report(self) -> str:
        """A few lines for a person: how many rows are used, held out, and left out for which reasons."""
        held_out = len(self._held_out)
        lines = [
            f"{self.used:,} of {len(self.table):,} rows of {self.config.path!r}, version {self.table.version}",
            f"{self.used - held_out:,} to train on, {held_out:,} held out",
        ]
        return "\n".join(lines + [f"{count:,} left out: {why}" for why, count in self.left_out.items()])

    # Which rows there are.

    def _usable(self, small: "pa.Table") -> NDArray[np.bool_]:
        """(N,) rows that nothing speaks against; what speaks against the others is counted."""
        usable = np.ones(len(self.table), dtype=bool)
        against = {"clips": small["media"].to_numpy() != "image", "a fault": small["fault"].to_numpy() != ""}
        against["the owner opted out"] = small["opt_out"].fill_null(False).to_numpy()
        if VERDICT in small.column_names:
            against["a verdict"] = small[VERDICT].fill_null("").to_numpy() != ""
        if self.config.where:
            against[f"not {self.config.where}"] = ~self.table.matching(self.config.where)
        for why, those in against.items():
            if count := int((usable & those).sum()):
                self.left_out[why] = count
            usable &= ~those
        return usable

    def _bucketed(self, small: "pa.Table", rows: NDArray[np.int64]) -> tuple[list[buckets.Shape], Tensor]:
        """The shapes of pictures, and which of them every row has."""
        assigned = torch.zeros(len(self.table), dtype=torch.int64)
        if not self.config.multiple:
            return [(self.config.size, self.config.size)], assigned
        shapes = buckets.shapes(self.config.size, self.config.multiple)
        sizes = zip(*(small[side].take(rows).to_pylist() for side in ("width", "height")), strict=True)
        assigned[torch.from_numpy(rows)] = buckets.assign(list(sizes), shapes)
        return shapes, assigned

    # From rows to samples.

    def _batch(self, chosen: Chosen, start: int) -> Batch:
        """The batch of some rows, the first of which stands at position `start` of the stream."""
        rows = chosen.rows.tolist()
        there = self._read(rows)
        samples = [self._sound(there[row], row, chosen.bucket, start + place) for place, row in enumerate(rows)]
        return _collated(samples, self.shapes[chosen.bucket])

    def _read(self, rows: Sequence[int]) -> dict[int, Row]:
        """Rows by their numbers, from memory or the disk."""
        there = {row: self._known[row] for row in rows if row in self._known}
        missing = [row for row in dict.fromkeys(rows) if row not in there]
        if missing:
            pictures = self.config.latents or "content"
            captions = list(self.config.captions) or [CAPTIONS]
            found = self.table.take(missing, ["id", pictures, *captions, *filter(None, [self.config.states])])
            for number, row in zip(missing, found.to_pylist(), strict=True):
                variants = {name: texts(row[name]) for name in captions}
                there[number] = Row(row["id"], variants, row.get("content"), row.get(self.config.latents), row.get(self.config.states))
        return there

    def _sound(self, row: Row, number: int, bucket: int, position: int) -> "_Sample":
        """The sample of a row at a position of the stream; where it cannot be decoded, that of the next one that can."""
        for _ in range(len(self)):
            try:
                return self._sample(row, number, self.shapes[bucket], position)
            except UnusableError as error:
                self._set_aside(number, row.name, str(error))
            number = self.order.after(number)
            row = self._read([number])[number]
        raise UserError(f"no row like {row.name!r} of {self.config.path!r} can be decoded; filter the table first")

    def _sample(self, row: Row, number: int, shape: buckets.Shape, position: int | None) -> "_Sample":
        """A row as it is at a position of the stream; None: as it is held out. UnusableError where it cannot be decoded."""
        draw = random.Random(f"{self.config.seed} sample {position}")
        prompt = self._prompt(row, draw, position)
        cond = cache.states_of(row.states, prompt) if self.config.states else None
        if self.config.latents:
            if row.latents is None:
                raise UnusableError("no latents")
            return _Sample(row.name, prompt, cond, latents=cache.unpack(row.latents)["latents"])
        flip = position is not None and self.config.flip and draw.random() < 0.5
        cut = (draw.random(), draw.random()) if position is not None and self.config.crop == "random" else CENTRE
        if row.pixels is None or row.pixels.shape[1::-1] != shape:
            if row.content is None:
                raise UnusableError("no content")
            row = Row(row.name, row.captions, None, None, row.states, fitted(row.content, *shape, cut))
            if self._keeps and (position is not None or len(self.shapes) == 1):
                self._known[number] = row
        assert row.pixels is not None
        return _Sample(row.name, prompt, cond, row.pixels[:, ::-1] if flip else row.pixels)

    def _prompt(self, row: Row, draw: random.Random, position: int | None) -> str:
        if position is None:
            frequent = sorted(row.captions, key=lambda name: -self.config.captions.get(name, 1.0))
            return next((row.captions[name][0] for name in frequent if row.captions[name]), "")
        if self.config.captions:
            return choose(row.captions, self.config.captions, self.config.seed, position)
        return draw.choice(row.captions[CAPTIONS] or [""])

    def _set_aside(self, number: int, name: str, reason: str) -> None:
        """Note a row that cannot be decoded. UserError where there are too many."""
        with self._lock:
            if number in self._faulty:
                return
            self._faulty.add(number)
            self.bad.append(Bad(name, reason))
        warnings.warn(f"{name!r} of {self.config.path!r} is set aside: {reason}", stacklevel=2)
        count, total = len(self._faulty), self.used
        if count > self.config.max_bad * total:
            raise UserError(
                f"{count} of {total} rows of {self.config.path!r} cannot be decoded, the last being {name!r} ({reason}); filter the table, "
                f"or go on without them with max_bad of {count / total:.3g} or more"
            )


@dataclass
class _Sample:
    """pixels: (H, W, 3) uint8, or latents (c, h, w)."""

    name: str
    prompt: str
    cond: Cond | None
    pixels: NDArray[np.uint8] | None = None
    latents: Tensor | None = None


def _collated(samples: Sequence[_Sample], shape: buckets.Shape) -> Batch:
    """Samples of one shape as a batch."""
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    latents = [sample.latents for sample in samples if sample.latents is not None]
    conds = [sample.cond for sample in samples if sample.cond is not None]
    if latents:
        images = torch.empty(len(samples), 3, 0, 0)
    else:
        images = torch.from_numpy(np.stack(pixels) if pixels else np.empty((0, *shape[::-1], 3), np.uint8)).permute(0, 3, 1, 2)
    return Batch(
        images,
        [sample.prompt for sample in samples],
        [sample.name for sample in samples],
        latents=torch.stack(latents).float() if latents else None,
        cond=Cond.cat(conds) if conds else None,
    )


def texts(value: str | list[str] | None) -> list[str]:
    """The captions of a column, which has one or several a row."""
    return [text for text in ([value] if isinstance(value, str) else value or []) if text]


def check(config: TableConfig) -> None:
    """UserError for settings that cannot be."""
    if config.size < 1:
        raise UserError(f"size must be at least 1 pixel, not {config.size}")
    if not 0 <= config.held_out < 1:
        raise UserError(f"held_out is a share, from 0 to below 1, not {config.held_out}")
    if not 0 <= config.max_bad <= 1:
        raise UserError(f"max_bad is a share, from 0 to 1, not {config.max_bad}")
    if config.latents and (config.flip or config.crop != "centre"):
        raise UserError("latents are of whole, centred pictures; train on them without flip and random crop, or on the pictures")
    if config.captions and min(config.captions.values()) <= 0:
        raise UserError(f"captions must have weights above 0, got {config.captions}")
