"""Pairs of rows that are near each other, without looking at all pairs.

A row has vectors: one by which it is found, and some with which it looks for others. Those by which rows are found lie in cells around
leaders, rows drawn from among them (an inverted file, Sivic and Zisserman 2003), each in the cells of its `LISTS` nearest leaders; a vector
that looks goes to the cell of its nearest. With cells in proportion to the square root of the rows, the work grows as rows^1.5. What is
found so is a candidate: it is looked at again, whole.

Every worker holds the cells, about 2 D + 50 bytes a row, and takes one fragment at a time; the rest stays in the table.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mezzotint import config
from mezzotint.curation.stage import EngineName, deal
from mezzotint.data.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

EXACT = 4096  # rows up to which there is one cell, so that no pair is missed
CELLS = 4.0  # of them, over the square root of the rows
LISTS = 8  # cells that a row is found in
MOST = 32  # candidates of a row that are looked at again, the nearest first
AT_ONCE = 1024  # pairs or vectors

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Place = tuple[str, int]  # a table and its version


class Look(config.Config, ABC, kind="look"):
    """What makes two rows of a table the same, in three parts. N rows, W vectors that look, D their width."""

    column: str  # which it reads
    least: float  # cosine of a candidate

    @abstractmethod
    def values(self, column: "pa.ChunkedArray | pa.Array") -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(N, ...) values and which of the rows have one; the others are not compared."""

    @abstractmethod
    def found_by(self, values: NDArray[Any]) -> Floats:
        """(N, D) unit vectors; zeros are found by nobody."""

    @abstractmethod
    def looking(self, values: NDArray[Any]) -> Floats:
        """(N, W, D) unit vectors."""

    @abstractmethod
    def same(self, values: NDArray[Any], others: NDArray[Any], which: Rows) -> NDArray[np.bool_]:
        """(N,) whether others are the same, found by the vectors of these numbers (N,)."""


class Cells:
    """Unit vectors (N, D) in cells."""

    def __init__(self, vectors: Floats) -> None:
        self.vectors = vectors.astype(np.float16)
        count = len(vectors)
        cells = 1 if count <= EXACT else round(CELLS * count**0.5)
        drawn = np.random.default_rng(0).choice(count, cells, replace=False) if count else np.zeros(1, np.int64)
        self.leaders = vectors[drawn] if count else np.zeros((1, vectors.shape[1]), np.float32)
        lists = min(LISTS, cells)
        near = [_nearest(vectors[k : k + AT_ONCE] @ self.leaders.T, lists) for k in range(0, count, AT_ONCE)]
        of = np.concatenate(near).ravel() if near else np.zeros(0, np.int64)
        order = np.argsort(of, kind="stable")
        self.members = (order // lists).astype(np.int32)
        self.starts = np.searchsorted(of[order], np.arange(cells + 1))

    def near(self, vectors: Floats, least: float) -> tuple[Rows, Rows, Floats]:
        """Numbers of vectors (P, D), of those near them, and their cosines."""
        of = np.concatenate(
            [np.zeros(0, np.int64), *((vectors[k : k + AT_ONCE] @ self.leaders.T).argmax(1) for k in range(0, len(vectors), AT_ONCE))]
        )
        order = np.argsort(of, kind="stable")
        found: list[tuple[Rows, Rows, Floats]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for cell, those in zip(*_groups(of[order], order), strict=True):
            members = self.members[self.starts[cell] : self.starts[cell + 1]]
            for first in range(0, len(members), AT_ONCE):
                some = members[first : first + AT_ONCE]
                for part in range(0, len(those), AT_ONCE):
                    cosine = vectors[those[part : part + AT_ONCE]] @ self.vectors[some].astype(np.float32).T
                    mine, theirs = np.nonzero(cosine > least)
                    found.append((those[part + mine], some[theirs].astype(np.int64), cosine[mine, theirs]))
        one, two, cosine = (np.concatenate(part) for part in zip(*found, strict=True))
        return one, two, cosine


def _nearest(cosine: Floats, count: int) -> Rows:
    return (
        np.argpartition(-cosine, count - 1, axis=1)[:, :count] if count < cosine.shape[1] else np.tile(np.arange(count), (len(cosine), 1))
    )


def _groups(keys: Rows, values: Rows) -> tuple[Rows, list[Rows]]:
    """Different keys of a sorted list, and the values of each."""
    unique, starts = np.unique(keys, return_index=True)
    return unique, np.split(values, starts[1:]) if len(unique) else []


class Finder:
    """Looks for the rows of one fragment among all rows of a table, the same one or another. Made in the process that it works in."""

    def __init__(self, here: Place, there: Place, look: Look) -> None:
        self.table, self.there, self.look, self.within = Table.open(*here), Table.open(*there), look, here == there
        self.starts = dict(zip(self.table.fragments, _starts(self.table), strict=True))
        vectors, keys, rows = [np.zeros((0, 1), np.float32)], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        first = 0
        for batch in self.there.batches([look.column]):
            values, there_is = look.values(batch[look.column])
            found = look.found_by(values)
            vectors.append(found)
            keys.append(_keys(values))
            rows.append(first + np.flatnonzero(there_is))
            first += batch.num_rows
        joined = np.concatenate(vectors[1:]) if len(vectors) > 1 else vectors[0]
        clear = joined.any(1)
        every = np.concatenate(keys)[clear]
        firsts = np.unique(every, return_index=True)[1] if self.within else np.argsort(every, kind="stable")
        self.keys, self.rows = every[firsts], np.concatenate(rows)[clear][firsts]
        self.cells = Cells(joined[clear][firsts])

    def __call__(self, fragment: int) -> str:
        """The pairs of a row here and one there, as JSON."""
        start, pairs = self.starts[fragment], []
        for batch in self.table.batches([self.look.column], fragment=fragment):
            values, there_is = self.look.values(batch[self.look.column])
            rows = start + np.flatnonzero(there_is)
            start += batch.num_rows
            pairs += self._pairs(values, rows)
        return json.dumps(pairs)

    def _pairs(self, values: NDArray[Any], rows: Rows) -> list[tuple[int, int]]:
        clear = self.look.found_by(values).any(1)
        values, rows = values[clear], rows[clear]
        if not len(rows) or not len(self.keys):
            return []
        keys = _keys(values)
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        equal = self.keys[place] == keys
        pairs = np.stack([rows, self.rows[place]], axis=1)[equal]
        if self.within:
            first = self.rows[place] == rows
            pairs, values, rows = pairs[pairs[:, 0] != pairs[:, 1]], values[first], rows[first]
        return [(int(a), int(b)) for a, b in [*pairs, *self._verified(values, rows)]]

    def _verified(self, values: NDArray[Any], rows: Rows) -> Iterator[tuple[int, int]]:
        vectors = self.look.looking(values)
        number, other, cosine = self.cells.near(vectors.reshape(-1, vectors.shape[-1]), self.look.least)
        mine, which = number // vectors.shape[1], number % vectors.shape[1]
        keep = self.rows[other] != rows[mine] if self.within else np.ones(len(mine), np.bool_)
        mine, other, which, cosine = mine[keep], other[keep], which[keep], cosine[keep]
        best = np.argsort(-cosine, kind="stable")
        best = best[np.unique((mine * len(self.rows) + other)[best], return_index=True)[1]]  # the best of each pair
        best = best[np.lexsort((-cosine[best], mine[best]))]
        rank = np.arange(len(best)) - np.searchsorted(mine[best], mine[best])
        best = best[rank < MOST]
        for first in range(0, len(best), AT_ONCE):
            some = best[first : first + AT_ONCE]
            theirs = self.rows[other[some]]
            taken, inverse = np.unique(theirs, return_inverse=True)
            others = self.look.values(self.there.take(taken.tolist(), [self.look.column])[self.look.column])[0][inverse]
            same = self.look.same(values[mine[some]], others, which[some])
            yield from zip(rows[mine[some]][same], theirs[same], strict=True)


def _starts(table: Table) -> list[int]:
    counts = [int(fragment.count_rows()) for fragment in table.fragments.values()]
    return [sum(counts[:k]) for k in range(len(counts))]


def _keys(values: NDArray[Any]) -> NDArray[np.uint64]:
    """(N,) one number for each row of values: of equal ones the same, of others almost surely another."""
    if not len(values):
        return np.zeros(0, np.uint64)
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    words = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8))).view(np.uint64)
    odd = np.random.default_rng(0).integers(0, 1 << 63, words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = (words ^ (words >> np.uint64(29))) * odd
    result: NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(32))).sum(1, dtype=np.uint64)
    return result


def pairs(table: Table, look: Look, engine: EngineName = "native", workers: int = 2, among: Table | None = None) -> Rows:
    """(M, 2) numbers of a row here and of one `among` the rows of a table that are the same: this table, unless another is given.

    A pair may be named once or twice, and of equal rows each is paired with the first. Which of two is a part of the other is not known, so
    both look for each other.
    """
    found = _found(table, among or table, look, engine, workers)
    return found if among is None else np.concatenate([found, _found(among, table, look, engine, workers)[:, ::-1]])


def _found(table: Table, among: Table, look: Look, engine: EngineName, workers: int) -> Rows:
    table.check([look.column])
    among.check([look.column])
    where = ((str(table.path), table.version), (str(among.path), among.version), look)
    parts = [json.loads(part) for _, part in deal(Finder, where, list(table.fragments), engine, workers)]
    return np.array([pair for part in parts for pair in part], np.int64).reshape(-1, 2)
