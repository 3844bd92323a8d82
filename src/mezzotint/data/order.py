"""Where it fits: which rows stand where in the endless stream of training, and which rows training never sees.

In: the digests of rows; rows in parts with weights; the buckets of rows. Out: the split, and batch number -> rows. All of it is a pure
function of the arguments and a seed, so that any batch is found at once, in any process, in any order.
Gotchas: an epoch is one of a part, in which each of its rows comes once. Where pictures have buckets, a batch is of one part.
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
from mezzotint.errors import UserError

BLOCK = 1024  # places of a stream within which the parts of a mixture have exactly their shares


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


class Mixture:
    """Deals the places of a stream out to parts. In every `BLOCK` of places they have their shares, rounded, in another order."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights or min(weights) <= 0:
            raise UserError(f"mixture must have weights above 0, got {list(weights)}")
        exact = [BLOCK * weight / sum(weights) for weight in weights]
        self.counts = [int(number) for number in exact]
        rest = sorted(range(len(exact)), key=lambda part: self.counts[part] - exact[part])
        for part in rest[: BLOCK - sum(self.counts)]:
            self.counts[part] += 1
        if min(self.counts) == 0:
            raise UserError(f"mixture must have weights of at least 1/{BLOCK} of their sum, got {list(weights)}")
        self.seed = seed
        self._block: Callable[[int], tuple[Tensor, Tensor]] = lru_cache(maxsize=4)(self._deal)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) the part that each of these places belongs to, and which place of the part's own stream it is."""
        if len(self.counts) == 1:
            return torch.zeros_like(places), places
        parts, own = torch.empty_like(places), torch.empty_like(places)
        for block in (places // BLOCK).unique().tolist():
            here = places // BLOCK == block
            dealt, within = self._block(block)
            parts[here] = dealt[places[here] % BLOCK]
            own[here] = block * torch.tensor(self.counts)[parts[here]] + within[places[here] % BLOCK]
        return parts, own

    def _deal(self, block: int) -> tuple[Tensor, Tensor]:
        """(BLOCK,) the parts of a block, and how many places before it in the block each part has."""
        dealt = [part for part, count in enumerate(self.counts) for _ in range(count)]
        random.Random(f"{self.seed} block {block}").shuffle(dealt)
        parts = torch.tensor(dealt)
        return parts, torch.nn.functional.one_hot(parts, len(self.counts)).cumsum(0).gather(1, parts[:, None])[:, 0] - 1


@dataclass(frozen=True)
class Chosen:
    """A batch: rows (B,), the parts that they are of (B,), and the one bucket of all of them."""

    rows: Tensor
    parts: Tensor
    bucket: int


class Order:
    """The endless order of rows.

    parts: rows of each, ascending. weights: of the parts. assigned: (N,) the bucket of every row, of `number` buckets; where there is one
    bucket, the stream does not depend on how it is cut into batches.
    """

    def __init__(self, parts: Sequence[Tensor], weights: Sequence[float], assigned: Tensor, number: int, seed: int) -> None:
        names = [f"{seed}" if len(parts) == 1 else f"{seed} part {part}" for part in range(len(parts))]
        self.parts, self.assigned, self.number, self.seed = parts, assigned, number, seed
        self.mixture = Mixture(weights, seed)
        self.streams = [Stream(rows, name) for rows, name in zip(parts, names, strict=True)]
        self._bucketed: Callable[[int, int], buckets.Order] = lru_cache(maxsize=2 * len(parts))(self._make)
        self._members: Callable[[int, int], Tensor] = lru_cache(maxsize=number * len(parts))(self._find)

    def batch(self, number: int, size: int) -> Chosen:
        """Batch 0, 1, ... of `size` rows."""
        if self.number == 1:
            parts, places = self.mixture.at(torch.arange(number * size, (number + 1) * size))
            rows = torch.empty_like(places)
            for part in parts.unique().tolist():
                rows[parts == part] = self.streams[part].at(places[parts == part])
            return Chosen(rows, parts, 0)
        part, own = (int(value) for value in self.mixture.at(torch.tensor([number])))
        found = self._bucketed(part, size).batch(own)
        return Chosen(self.parts[part][found.chosen], torch.full((size,), part), found.bucket)

    def after(self, row: int, part: int) -> int:
        """The next row of the same part and bucket, the first one after the last: what comes in the place of one that is unusable."""
        members = self._members(part, int(self.assigned[row]))
        return int(members[(int(torch.searchsorted(members, row, right=True))) % len(members)])

    def _make(self, part: int, size: int) -> buckets.Order:
        return buckets.Order(self.assigned[self.parts[part]], [size] * self.number, self.seed + part)

    def _find(self, part: int, bucket: int) -> Tensor:
        rows = self.parts[part]
        return rows[self.assigned[rows] == bucket]
