"""What training eats: batches, the sources they come from, and the loader that remembers where it was."""

import time
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class Batch:
    """Captioned pictures.

    images: (B, C, H, W) float32 in [-1, 1].
    prompts: B captions; "" is a picture without one.
    ids: B names by which a person finds the samples again (a file name, a seed).
    rejected: (B, C, H, W), the losing pictures of preference pairs whose winners are `images`; None elsewhere.
    """

    images: Tensor
    prompts: list[str]
    ids: list[str]
    rejected: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


class Source(Protocol):
    """Where batches come from. Both methods are pure: the same arguments give the same batch, in any process."""

    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` (0, 1, ...) of the endless training stream, `size` samples."""
        ...

    def held_out(self, size: int) -> Batch:
        """The first `size` samples (or as many as there are) of the part that training never sees."""
        ...


class Loader:
    """An endless iterator over a source whose whole state is one integer.

    Rank r of W takes batches r, r + W, r + 2W, ... so ranks never share a sample stream. To resume, set `position`.
    """

    def __init__(self, source: Source, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.source, self.batch_size, self.rank, self.world = source, batch_size, rank, world
        self.position = 0
        self.waited = 0.0  # seconds that the caller waited for batches

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = self.source.batch(self.position * self.world + self.rank, self.batch_size)
        self.position += 1
        self.waited += time.perf_counter() - start
        return batch
