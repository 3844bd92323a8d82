"""Where it fits: preference pairs of one's own as a `Source`, for preference optimisation and reward models.

In: a folder of pictures with `pairs.jsonl` or `pairs.csv`, whose rows have the columns `winner` and `loser`, files of the folder by their
paths in it, and `text`, the caption of both. Out: batches of squares cut from the middle, the losers as `Batch.rejected`, and the list of
what could not be used. Pairs that lie in Parquet are `data.pair_shards`.
How: every picture is decoded at the start, once. Those of small sets stay in memory; others are decoded again when they are asked for.
Gotchas: pairs are held out by their captions, as reward models hold them out, so a picture under two captions can be on both sides. Pairs
of identical pictures are kept: methods count them.
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mezzotint import config
from mezzotint.data.batch import Batch
from mezzotint.data.decode import UnusableError, square
from mezzotint.data.folder import CHUNK, squares
from mezzotint.data.order import Stream, leading, split
from mezzotint.data.pair_shards import PairShards, holds_pairs
from mezzotint.data.rows import MEMORY, MOST_WORKERS, TableConfig, check
from mezzotint.data.survey import Bad, Contents, Row, absence, is_utf8, listed, reasons, refusal, survey
from mezzotint.errors import UserError

PAIRS = ("pairs.jsonl", "pairs.csv")


@dataclass
class PreferencesConfig(config.Config, kind="preferences"):
    """A folder of preference pairs: a list of them and their pictures, or shards of Parquet.

    path: the folder. size: side of the square pictures, in pixels. held_out: share of the captions kept out of training, with their pairs.
    max_bad: the share of rows set aside above which the folder is refused. seed: of the order; the split does not depend on it.
    """

    path: str
    size: int = 32
    held_out: float = 0.05
    max_bad: float = 0.1
    seed: int = 0

    def build(self) -> "Preferences | PairShards":
        return PairShards(self) if not is_listed(self.path) and holds_pairs(self.path) else Preferences(self)


@dataclass(frozen=True)
class Pair:
    """A row. place: where it stands, as in "pairs.csv:7". files: of the winner and the loser. text: their caption, or ""."""

    place: str
    files: tuple[str, str]
    text: str


def is_preferences(path: str | Path) -> bool:
    """Whether there is a folder of pairs at a path."""
    return is_listed(path) or holds_pairs(path)


def is_listed(path: str | Path) -> bool:
    """Whether a folder has a list of pairs."""
    return any(os.path.isfile(os.path.join(path, name)) for name in PAIRS)


class Preferences:
    """A `Stored` source: the pairs of a folder, all of them once in every epoch, with pictures as those of `data.folder` are.

    On which side of the split a pair falls is a function of its caption's words, or of its pictures where all captions are the same.
    pairs: the usable ones, in the order of their rows. bad: what was set aside. version: a digest of places, pictures and captions.
    Raises `UserError` if the folder cannot be read, holds fewer than two usable pairs that differ, or too large a share of it is bad.
    """

    def __init__(self, config: PreferencesConfig) -> None:
        check(TableConfig(config.path, size=config.size, held_out=config.held_out, max_bad=config.max_bad))
        self.config, contents = config, survey(config.path)
        self.root, self.workers = contents.root, min(MOST_WORKERS, os.cpu_count() or 1)
        rows = {place: _pair(contents, place, row) for place, row in listed(contents, PAIRS)}
        self._known: dict[str, NDArray[np.uint8]] = {}
        digests, faults = self._look(sorted({file for pair in rows.values() if isinstance(pair, Pair) for file in pair.files}))
        for place, pair in rows.items():
            if isinstance(pair, Pair) and (broken := [file for file in pair.files if file in faults]):
                rows[place] = f"unusable picture: {broken[0]!r}: {faults[broken[0]]}"
        self.pairs = [pair for pair in rows.values() if isinstance(pair, Pair)]
        self.bad = [Bad(place, fault) for place, fault in rows.items() if isinstance(fault, str)]
        if len(self.bad) > config.max_bad * len(rows):
            raise refusal(config.path, self.bad, len(self.pairs))
        contained = [(pair.place, *(digests[file] for file in pair.files), pair.text) for pair in self.pairs]
        self.version = hashlib.sha256(json.dumps(contained).encode()).hexdigest()[:16]
        captions = [" ".join(pair.text.lower().split()) for pair in self.pairs]
        keys = captions if len(set(captions)) > 1 else [winner + loser for _, winner, loser, _ in contained]
        training, self._held_out = split(leading([hashlib.sha256(key.encode()).hexdigest() for key in keys]), config.held_out)
        if not len(self._held_out):
            raise UserError(f"{config.path!r} has {len(self.pairs)} usable pairs; give two or more that differ, since some are held out")
        self._stream = Stream(training, str(config.seed))

    def __len__(self) -> int:
        """The number of training pairs."""
        return len(self._stream.members)

    def batch(self, number: int, size: int) -> Batch:
        """Positions number * size to (number + 1) * size of the training stream."""
        return self.read(number, size).scaled()

    def read(self, number: int, size: int) -> Batch:
        """As `batch`, in any thread, with pictures 0..255."""
        return self._batch(self._stream.at(torch.arange(number * size, (number + 1) * size)))

    def held_out(self, size: int) -> Batch:
        """The first `size` held-out pairs, or as many as there are, in an order that is a function of what they are split by."""
        return self._batch(self._held_out[:size]).scaled()

    def report(self) -> str:
        """A few lines for a person: how many pairs are used, held out, without a caption, and set aside for which reasons."""
        side, plain = self.config.size, sum(not pair.text for pair in self.pairs)
        lines = [
            f"{len(self.pairs):,} preference pairs from {self.config.path!r}, as {side} x {side} pixels",
            f"{len(self):,} to train on, {len(self._held_out):,} held out",
            f"{plain:,} without a caption",
        ]
        return "\n".join(lines + reasons(self.bad))

    def _look(self, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Decode files: digests of the pixels of those that can be, and what is wrong with the others."""
        digests, faults = dict[str, str](), dict[str, str]()
        chunks = ([self.root / name for name in names[start : start + CHUNK]] for start in range(0, len(names), CHUNK))
        for name, pixels in zip(names, squares(chunks, len(names), self.config.size), strict=True):
            if isinstance(pixels, str):
                faults[name] = pixels
                continue
            digests[name] = hashlib.sha256(pixels.tobytes()).hexdigest()
            if len(names) * pixels.nbytes <= MEMORY:
                self._known[name] = pixels
        return digests, faults

    def _batch(self, rows: Tensor) -> Batch:
        pairs = [self.pairs[row] for row in rows.tolist()]
        winners, losers = (self._pictures([pair.files[side] for pair in pairs]) for side in (0, 1))
        return Batch(winners, [pair.text for pair in pairs], [pair.place for pair in pairs], losers)

    def _pictures(self, names: Sequence[str]) -> Tensor:
        """(B, 3, size, size) uint8."""
        side = self.config.size
        try:
            pixels = [self._known[name] if name in self._known else square(self.root / name, side) for name in names]
        except UnusableError as error:
            raise UserError(f"a picture of {self.config.path!r} can no longer be read ({error}); put it back, and go on") from error
        return torch.from_numpy(np.array(pixels, dtype=np.uint8).reshape(-1, 3, side, side))


def _pair(contents: Contents, place: str, row: Row) -> Pair | str:
    """The pair of a row, or what is wrong with it."""
    if isinstance(row, str):
        return row
    files = []
    for name in (row.get("winner"), row.get("loser")):
        if not isinstance(name, str) or not name:
            return "unreadable row: no winner or no loser"
        files.append(posixpath.normpath(name))
        if files[-1] not in contents.files:
            return absence(contents.root, name)
        if fault := contents.files[files[-1]]:
            return f"{fault}: {name!r}"
    text = "" if row.get("text") is None else row["text"]
    if not isinstance(text, str) or not is_utf8(text):
        return f"bad caption: not {'UTF-8' if isinstance(text, str) else 'a string'}"
    return Pair(place, (files[0], files[1]), text.strip())
