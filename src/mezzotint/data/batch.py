"""What training eats: batches, the sources they come from, and the loader that remembers where it was."""

import time
from copy import copy
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass
class Batch:
    """Captioned pictures.

    images: (B, C, H, W) float32 in [-1, 1].
    prompts: B captions; "" is a picture without one.
    ids: B names by which a person finds the samples again (a file name, a seed).
    rejected: (B, C, H, W), the losing pictures of preference pairs whose winners are `images`; None elsewhere.
    latents, noise: (B, c, h, w) each, of what a teacher drew and the noise that it came from (`data.pairs`); None elsewhere. Images have
    no height and width there.
    """

    images: Tensor
    prompts: list[str]
    ids: list[str]
    rejected: Tensor | None = None
    latents: Tensor | None = None
    noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved = copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved


class Source(Protocol):
    """Where batches come from. Both methods are pure: the same arguments give the same batch, in any process."""

    @property
    def version(self) -> str:
        """A name of the data themselves: another one where any batch may be another."""
        ...

    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` (0, 1, ...) of the endless training stream, `size` samples."""
        ...

    def held_out(self, size: int) -> Batch:
        """The first `size` samples (or as many as there are) of the part that training never sees."""
        ...


class Loader:
    """An endless iterator over one of the streams that a source is dealt out into.

    Stream m of A has the batches m, m + A, m + 2A, ... of the source, so the micro-batches of a step share no sample, and which they
    get does not depend on who works on them. The state is one integer, `position`, the next place in any of the streams.
    """

    def __init__(self, source: Source, batch_size: int, stream: int = 0, streams: int = 1, device: torch.device | None = None) -> None:
        self.source, self.batch_size, self.stream, self.streams, self.device = source, batch_size, stream, streams, device
        self.position = 0
        self.waited = 0.0  # seconds that the caller waited for batches

    def go_on(self, source: Source, batch_size: int, streams: int) -> None:
        """From another source, or in other portions, after the samples that were taken so far: at the next batch that has none of them."""
        taken = self.position * self.streams * self.batch_size
        self.source, self.batch_size, self.streams = source, batch_size, streams
        self.position = -(-taken // (streams * batch_size))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        with torch.device("cpu"):
            batch = self.source.batch(self.position * self.streams + self.stream, self.batch_size)
        if self.device is not None:
            batch = batch.to(self.device)
        self.position += 1
        self.waited += time.perf_counter() - start
        return batch
