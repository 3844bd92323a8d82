"""Where it fits: pictures of many shapes in batches of one shape each, so that nothing is padded and little is cut off.

A bucket is a shape of about one area (NovelAI 2022; as in SDXL, Podell et al. 2023, section 2.3). A picture goes to the bucket whose
aspect is nearest to its own by logarithm, a batch is of one bucket, and has as many pictures as fit into a constant number of tokens.
So a network that is compiled sees as many kinds of batches as there are numbers of tokens.

In: the sizes of pictures, (width, height). Out: batch number -> its bucket and the pictures in it, a pure function of that number and the
seed: a loader resumes by its position alone. Nothing here knows where pictures are.
Gotchas: every bucket goes through its pictures again and again, each time in another order, and the rest of one time that fills no batch
begins the first batch of the next. So no picture is dropped, and of one bucket none is ever seen twice more often than another.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor

Shape = tuple[int, int]  # width and height in pixels
SIDES = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1))
ASPECTS = tuple(sorted({w / h for a, b in SIDES for w, h in ((a, b), (b, a))}))  # width over height
SPREAD = 0.1  # by which the area of a bucket may differ from the one that is asked for


def shape(side: int, aspect: float, multiple: int) -> Shape:
    """The shape of area side^2 and some aspect (width over height), each side rounded to a multiple. ValueError where that is none."""
    if aspect <= 0 or multiple < 1 or side < multiple:
        raise ValueError(f"aspect must be above 0 and multiple within [1, side], got {aspect}, {multiple} and {side}")
    height = side / math.sqrt(aspect)
    width, height = (max(1, round(length / multiple)) * multiple for length in (aspect * height, height))
    return width, height


def shapes(side: int, multiple: int, aspects: Sequence[float] = ASPECTS) -> list[Shape]:
    """The buckets: shapes of these aspects whose area is about side^2, each once, tall ones first.

    multiple: what sides have to be multiples of, pixels of a latent's place times the patch. ValueError where no area is near enough,
    since sides are few multiples long then.
    """
    found = {shape(side, aspect, multiple) for aspect in aspects}
    near = [(w, h) for w, h in found if abs(w * h / side**2 - 1) <= SPREAD]
    if not near:
        raise ValueError(f"side must be a larger multiple of {multiple}: no shape has an area within {SPREAD:.0%} of {side} x {side}")
    return sorted(near, key=lambda size: (size[0] / size[1], size))


def assign(sizes: Sequence[Shape], buckets: Sequence[Shape]) -> Tensor:
    """(N,) numbers of the buckets whose aspect is nearest to that of pictures of N sizes, by logarithm; of equal ones the first."""
    if not buckets or any(min(size) < 1 for size in sizes):
        raise ValueError("sizes must be at least 1 pixel a side, and buckets at least one")
    ours, theirs = (torch.tensor(list(given), dtype=torch.float64).reshape(-1, 2).log().diff(dim=1) for given in (sizes, buckets))
    return (ours - theirs.T).abs().argmin(1)


def batch_size(bucket: Shape, multiple: int, tokens: int) -> int:
    """How many pictures of a bucket have at most so many tokens, of which each is a square of `multiple` pixels a side; at least one."""
    return max(1, tokens // (bucket[0] // multiple * (bucket[1] // multiple)))


@dataclass(frozen=True)
class Bucketed:
    """A batch: the number of its bucket, and which pictures it has, (B,)."""

    bucket: int
    chosen: Tensor


class Order:
    """The endless order of the batches of N pictures. `batch(number)` is a pure function of the arguments and the seed.

    assigned: (N,) the bucket of every picture. batch_sizes: of every bucket. In epoch e bucket k, of n_k pictures in batches of s_k, has
    floor((e + 1) n_k / s_k) - floor(e n_k / s_k) batches, and those of all buckets are shuffled: buckets come as often as they are large.
    """

    def __init__(self, assigned: Tensor, batch_sizes: Sequence[int], seed: int = 0) -> None:
        if len(assigned) == 0 or min(batch_sizes, default=0) < 1:
            raise ValueError("assigned must have a picture, and batch_sizes must be at least 1")
        self.members = [torch.nonzero(assigned == bucket).flatten() for bucket in range(len(batch_sizes))]
        if sum(map(len, self.members)) < len(assigned):
            raise ValueError(f"batch_sizes must have one for every bucket, got {len(batch_sizes)} and bucket {int(assigned.max())}")
        self.batch_sizes, self.seed = batch_sizes, seed
        self._shuffled: Callable[[int], list[tuple[int, int]]] = lru_cache(maxsize=2)(self._shuffle)
        self._permutation: Callable[[int, int], Tensor] = lru_cache(maxsize=2 * len(batch_sizes))(self._permute)

    def before(self, epoch: int) -> list[int]:
        """How many batches of every bucket come before an epoch 0, 1, ..."""
        return [epoch * len(members) // size for members, size in zip(self.members, self.batch_sizes, strict=True)]

    def batch(self, number: int) -> Bucketed:
        """Batch 0, 1, ... of all of them."""
        # A bucket's share of an epoch is at least its pictures over the largest batch; rounding takes less than one batch from each.
        buckets, pictures = len(self.members), sum(map(len, self.members))
        enough = (number + buckets) * max(self.batch_sizes) // pictures + 2
        epoch = bisect_right(range(enough), number, key=lambda e: sum(self.before(e))) - 1
        bucket, own = self._shuffled(epoch)[number - sum(self.before(epoch))]
        size = self.batch_sizes[bucket]
        return Bucketed(bucket, self._stream(bucket, own * size, (own + 1) * size))

    def _stream(self, bucket: int, start: int, stop: int) -> Tensor:
        """Places of the stream of a bucket, which is one permutation of its pictures after another."""
        number = len(self.members[bucket])
        times = range(start // number, (stop - 1) // number + 1)
        return torch.cat([self._permutation(bucket, time)[max(start - time * number, 0) : stop - time * number] for time in times])

    def _permute(self, bucket: int, time: int) -> Tensor:
        seed = random.Random(f"{self.seed} bucket {bucket} time {time}").getrandbits(63)
        members = self.members[bucket]
        return members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))]

    def _shuffle(self, epoch: int) -> list[tuple[int, int]]:
        """The bucket of every batch of an epoch, and which of the bucket's batches it is."""
        start, stop = self.before(epoch), self.before(epoch + 1)
        buckets = [bucket for bucket, (first, last) in enumerate(zip(start, stop, strict=True)) for _ in range(last - first)]
        random.Random(f"{self.seed} epoch {epoch}").shuffle(buckets)
        numbers = [count(first) for first in start]
        return [(bucket, next(numbers[bucket])) for bucket in buckets]
