"""What training eats: batches, the sources they come from, and the loader that remembers where it was."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from mezzotint.data.survey import Bad
from mezzotint.models.cond import Cond, sent
from mezzotint.pipeline import Pipeline


@dataclass
class Batch:
    """Captioned pictures.

    images: (B, C, H, W) float32 in [-1, 1].
    prompts: B captions; "" is a picture without one.
    ids: B names by which a person finds the samples again (a file name, a seed).
    rejected: (B, C, H, W), the losing pictures of preference pairs whose winners are `images`; None elsewhere.
    latents: (B, c, h, w), of what a teacher drew (`data.pairs`) or of the pictures, made beforehand (`TableConfig.latents`); None
    elsewhere. Images have no height and width where there are latents. noise: (B, c, h, w), what the teacher's latents came from; None
    elsewhere. cond: the conditions of the prompts, made beforehand; None elsewhere.
    """

    images: Tensor
    prompts: list[str]
    ids: list[str]
    rejected: Tensor | None = None
    latents: Tensor | None = None
    noise: Tensor | None = None
    cond: Cond | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor | Cond):
                setattr(moved, name, sent(value, device) if isinstance(value, Tensor) else value.to(device))
        return moved

    def part(self, rows: slice) -> Self:
        """Some of the samples."""
        part = copy(self)
        for name, value in vars(self).items():
            if value is not None:
                setattr(part, name, value.index(rows) if isinstance(value, Cond) else value[rows])
        return part

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Batches one after the other; images 0..255 beside others are scaled. ValueError where some have what others have not."""
        if len({part.images.dtype for part in parts}) > 1:
            parts = [part.scaled() for part in parts]
        joined = copy(parts[0])
        for name in vars(joined):
            values = [value for part in parts if (value := getattr(part, name)) is not None]
            if values and len(values) < len(parts):
                raise ValueError(f"{name} must be in all batches or in none, and is in {len(values)} of {len(parts)}")
            if values:
                setattr(joined, name, _joined(values))
        return joined

    def x0(self, pipeline: Pipeline) -> Tensor:
        """Where a flow of pictures ends: the latents, or what the pipeline's codec makes of the images."""
        return pipeline.codec.encode(self.images) if self.latents is None else self.latents

    def conditions(self, pipeline: Pipeline) -> Cond:
        """The conditions of the prompts, as they were made beforehand or by the pipeline's text encoder."""
        return pipeline.encode(self.prompts) if self.cond is None else self.cond

    def scaled(self) -> Self:
        """The same with pictures that were 0..255, as `Stored.read` gives them, in [-1, 1]."""
        batch = copy(self)
        if self.images.dtype == torch.uint8:
            batch.images = scaled(self.images)
            batch.rejected = None if self.rejected is None else scaled(self.rejected)
        return batch


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Cond):
        return Cond.cat(values)
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else [each for value in values for each in value]


def scaled(images: Tensor) -> Tensor:
    """Images 0..255, uint8, in [-1, 1], float32."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


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


@runtime_checkable
class Stored(Source, Protocol):
    """A source whose batches take time to read, so that threads read the next ones meanwhile.

    workers: how many threads. bad: what could not be used so far, and was replaced.
    """

    workers: int
    bad: list[Bad]

    def read(self, number: int, size: int) -> Batch:
        """As `batch`, in any thread, with images (B, C, H, W) uint8, 0..255: a quarter of what has to be moved to a device."""
        ...

    def report(self) -> str:
        """A few lines for a person: how much is used, held out, and not used for which reasons."""
        ...


class ReadAhead:
    """Reads batches of a stored source before they are asked for. `read` is pure: it changes nothing but when they are there."""

    def __init__(self, source: Stored, size: int) -> None:
        self.source, self.size = source, size
        self.pool = ThreadPoolExecutor(source.workers, "read-ahead")
        self.waiting: dict[int, Future[Batch]] = {}

    def take(self, number: int, streams: int) -> Batch:
        """A batch of one of so many streams. The next ones of its stream begin to be read, and no others of that are kept."""
        wanted = range(number, number + self.source.workers * streams + 1, streams)
        for stale in [n for n in self.waiting if (n - number) % streams == 0 and n not in wanted]:
            self.waiting.pop(stale).cancel()
        for new in wanted:
            if new not in self.waiting:
                self.waiting[new] = self.pool.submit(self.source.read, new, self.size)
        return self.waiting.pop(number).result()

    def close(self) -> None:
        """Read no more."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class Loader:
    """An endless iterator over one of the streams that a source is dealt out into.

    Stream m of A has the batches m, m + A, m + 2A, ... of the source, so the micro-batches of a step share no sample, and which they
    get does not depend on who works on them. The state is one integer, `position`, the next place in any of the streams. Of a stored
    source as many batches are read ahead in every stream as it has workers.
    """

    def __init__(self, source: Source, batch_size: int, stream: int = 0, streams: int = 1, device: torch.device | None = None) -> None:
        self.source, self.batch_size, self.stream, self.streams, self.device = source, batch_size, stream, streams, device
        self.position = 0
        self.waited = 0.0  # seconds that the caller waited for batches
        self._stored = isinstance(source, Stored)  # asked once, since Python is slow to answer
        self._ahead: ReadAhead | None = None

    def go_on(self, source: Source, batch_size: int, streams: int) -> None:
        """From another source, or in other portions, after the samples that were taken so far: at the next batch that has none of them."""
        taken = self.position * self.streams * self.batch_size
        self.source, self.batch_size, self.streams = source, batch_size, streams
        self._stored = isinstance(source, Stored)
        self.position = -(-taken // (streams * batch_size))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        number = self.position * self.streams + self.stream
        if self._stored:
            batch = self._read(number)
        else:
            with torch.device("cpu"):
                batch = self.source.batch(number, self.batch_size)
        if self.device is not None:
            batch = batch.to(self.device)
        self.position += 1
        self.waited += time.perf_counter() - start
        return batch.scaled()

    def _read(self, number: int) -> Batch:
        source = cast(Stored, self.source)
        if self._ahead is None or (self._ahead.source, self._ahead.size) != (source, self.batch_size):
            self.close()
            self._ahead = ReadAhead(source, self.batch_size)
        return self._ahead.take(number, self.streams)

    def close(self) -> None:
        """Read nothing ahead any more."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
