"""Where it fits: which rows stand where in the endless stream of training, and which rows training never sees.

In: the digests of rows, and their buckets. Out: the split, and batch number -> rows. All of it is a pure function of the arguments and a
seed, so that any batch is found at once, in any process, in any order.
Gotchas: rows that repeat come several times in an epoch, all others once.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mezzotint.data import buckets


def split(digests: NDArray[np.uint64], share: float) -> tuple[Tensor, Tensor]:
    """Places of the training samples, ascending, and of the held-out ones, in the order of their digests.

    Digests are uniform, so those below `share` of their range are about that share of what is distinct. Equal ones fall on one side. Of
    two or more distinct ones each side has at least one.
    """
    distinct = np.unique(digests)
    below = int((distinct < share * 2**64).sum())
    number = min(max(below, 1), len(distinct) - 1)
    held = digests <= distinct[number - 1] if number > 0 else np.zeros(len(digests), dtype=bool)
    order = np.argsort(digests, kind="stable")
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(order[held[order]])


def leading(digests: Sequence[str]) -> NDArray[np.uint64]:
    """(N,) the first 64 bits of hexadecimal digests. ValueError for what is none."""
    letters = np.array(digests, dtype="S16").view(np.uint8).reshape(len(digests), 16).astype(np.uint64)
    nibbles = np.where(letters >= ord("a"), letters - (ord("a") - 10), letters - ord("0"))
    if nibbles.size and nibbles.max() > 15:
        raise ValueError("digests must be hexadecimal, in small letters, and have 16 of them or more")
    value: NDArray[np.uint64] = (nibbles << np.arange(60, -4, -4, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    return value


class Stream:
    """The endless stream of some rows: one permutation of them after another."""

    def __init__(self, members: Tensor, name: str) -> None:
        self.members, self.name = members, name
        self._permutation: Callable[[int], Tensor] = lru_cache(maxsize=2)(self._draw)

    def at(self, places: Tensor) -> Tensor:
        """The rows at places (B,) 0, 1, ... of the stream."""
        epochs, within = places // len(self.members), places % len(self.members)
        chosen = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            chosen[here] = self._permutation(epoch)[within[here]]
        return self.members[chosen]

    def _draw(self, epoch: int) -> Tensor:
        seed = random.Random(f"{self.name} epoch {epoch}").getrandbits(63)
        return torch.randperm(len(self.members), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Chosen:
    """A batch: rows (B,), and the one bucket of all of them."""

    rows: Tensor
    bucket: int


class Order:
    """The endless order of rows.

    rows: those of training. assigned: (N,) the bucket of every row, of `number` buckets; where there is one bucket, the stream does not
    depend on how it is cut into batches.
    """

    def __init__(self, rows: Tensor, assigned: Tensor, number: int, seed: int) -> None:
        self.rows, self.assigned, self.number, self.seed = rows, assigned, number, seed
        self.stream = Stream(rows, f"{seed}")
        self._bucketed: Callable[[int], buckets.Order] = lru_cache(maxsize=2)(self._make)
        self._members: Callable[[int], Tensor] = lru_cache(maxsize=number)(self._find)

    def batch(self, number: int, size: int) -> Chosen:
        """Batch 0, 1, ... of `size` rows."""
        if self.number == 1:
            return self.span(number * size, (number + 1) * size)
        found = self._bucketed(size).batch(number)
        return Chosen(self.rows[found.chosen], found.bucket)

    def span(self, start: int, stop: int) -> Chosen:
        """Places from `start` to before `stop` of the stream, where there is one bucket."""
        assert self.number == 1
        return Chosen(self.stream.at(torch.arange(start, stop)), 0)

    def after(self, row: int) -> int:
        """The next row of the same bucket, the first one after the last: what comes in the place of one that is unusable."""
        members = self._members(int(self.assigned[row]))
        return int(members[(int(torch.searchsorted(members, row, right=True))) % len(members)])

    def _make(self, size: int) -> buckets.Order:
        return buckets.Order(self.assigned[self.rows], [size] * self.number, self.seed)

    def _find(self, bucket: int) -> Tensor:
        return self.rows[self.assigned[self.rows] == bucket]
