"""Where it fits: several sources as one, for training: tables, folders and Worlds, each in its share.

In: sources by name, and how often a sample of each comes. Out: one stream of batches, and a held-out part with some of all.
How: in every `BLOCK` of places of the stream the parts have exactly their shares, in another order; the n-th place that falls to a part has
what stands at place n of the part's own stream. So all of it is a function of the seed and the place, as it is of one source.
Gotchas: an epoch is one of a part, in which each of its rows comes once. Where a part has pictures of many shapes, whole batches are dealt
out instead of samples. A picture that two tables have falls on one side of the split where both hold out the same share of hundreds of
rows; a table so small that its share is less than a row still holds out one.
"""

import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mezzotint import config
from mezzotint.data.batch import Batch, Source, Stored
from mezzotint.data.folder import Folder, FolderConfig
from mezzotint.data.preferences import PreferencesConfig, is_preferences
from mezzotint.data.rows import Rows, TableConfig
from mezzotint.data.survey import Bad
from mezzotint.data.table import is_table
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.pipeline import Pipeline

BLOCK = 1024  # places of a stream within which the parts have exactly their shares
Part = TableConfig | FolderConfig | WorldsConfig


@dataclass
class MixtureConfig(config.Config, kind="mixture"):
    """Sources in one stream.

    parts: by name; a subset of a table is a part with a `where` of its own. weights: how often a sample of each comes, in any unit. size:
    side of the pictures in pixels, which stands in the place of the parts' own. seed: of the deal; the parts have their own.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    size: int = 256
    seed: int = 0

    def build(self) -> "Mixture":
        return Mixture(self)

    def pinned(self, run: Path) -> "MixtureConfig":
        """The same with the numbers of the versions of all tables; see `TableConfig.pinned`."""
        return self.replace(parts={n: part.pinned(run, n) if isinstance(part, TableConfig) else part for n, part in self.parts.items()})


def found(paths: Sequence[str], size: int) -> TableConfig | FolderConfig | PreferencesConfig | MixtureConfig:
    """The data at a path, or a mixture in equal shares of those at several: PATH, whose name is that of the file, or NAME=PATH."""
    if len(paths) == 1:
        return PreferencesConfig(paths[0], size) if is_preferences(paths[0]) else _at(paths[0]).replace(size=size)
    parts: dict[str, Part] = {}
    for words in paths:
        name, _, path = words.rpartition("=")
        name, path = (name, path) if name.isidentifier() else (re.sub(r"\W", "_", Path(words).stem), words)
        if is_preferences(path):
            raise UserError(f"{path!r} holds preference pairs, which are not mixed with anything; give it alone")
        if name in parts:
            raise UserError(f"two of the data are called {name!r}; give them names: --data one=PATH --data other=PATH")
        parts[name] = _at(path)
    return MixtureConfig(parts, dict.fromkeys(parts, 1.0), size)


def _at(path: str) -> TableConfig | FolderConfig:
    return TableConfig(path) if is_table(path) or path.endswith(".lance") else FolderConfig(path)


class Mixture:
    """A `Stored` source. Its batches are floats in [-1, 1] where those of a part are. UserError for settings that cannot be."""

    def __init__(self, config: MixtureConfig) -> None:
        if not config.parts or config.parts.keys() != config.weights.keys():
            named = " and ".join(", ".join(names) or "none" for names in (config.parts, config.weights))
            raise UserError(f"a mixture needs a weight for each of its parts, got {named}")
        alike = {(bool(p.latents), bool(p.states)) if isinstance(p, TableConfig) else (False, False) for p in config.parts.values()}
        if len(alike) > 1:
            raise UserError("latents and states must be taken by all parts of a mixture or by none")
        self.config = config
        self.sources: dict[str, Source] = {name: part.replace(size=config.size).build() for name, part in config.parts.items()}
        self.deal = Deal([config.weights[name] for name in self.sources], config.seed)
        self.whole = any(isinstance(part, TableConfig) and part.multiple > 0 for part in config.parts.values())
        stored = {name: source for name, source in self.sources.items() if isinstance(source, Stored)}
        self.workers = max((source.workers for source in stored.values()), default=1)
        self.version = ", ".join(f"{name} {source.version}" for name, source in self.sources.items())
        self._stored, self._bad, self._lock = stored, dict[Bad, None](), threading.Lock()

    @property
    def bad(self) -> list[Bad]:
        """What was set aside in any of the parts, in the order in which it was asked for."""
        for name, source in self._stored.items():
            self._bad |= {Bad(f"{name}/{bad.file}", bad.reason): None for bad in list(source.bad)}
        return list(self._bad)

    def batch(self, number: int, size: int) -> Batch:
        """Batch 0, 1, ... of `size` samples. Their ids begin with the name of the part."""
        return self.read(number, size).scaled()

    def read(self, number: int, size: int) -> Batch:
        """As `batch`, in any thread."""
        places = torch.tensor([number]) if self.whole else torch.arange(number * size, (number + 1) * size)
        with self._lock:
            parts, own = self.deal.at(places)
        if self.whole:
            name, source = list(self.sources.items())[int(parts)]
            return _named(name, source.read(int(own), size) if isinstance(source, Stored) else source.batch(int(own), size))
        queues = [self._singles(name, own[parts == part].tolist()) for part, name in enumerate(self.sources)]
        return Batch.cat([next(queues[part]) for part in parts.tolist()])

    def held_out(self, size: int) -> Batch:
        """The first samples that the parts hold out, in their shares, `size` or as many as there are.

        Latents are of one shape, that of the first part.
        """
        counts = torch.bincount(self.deal.at(torch.arange(size))[0], minlength=len(self.sources)).tolist()
        pairs = zip(self.sources.items(), counts, strict=True)
        batches = [_named(name, source.held_out(count)) for (name, source), count in pairs if count]
        batches = [batch for batch in batches if len(batch)] or batches[:1]
        shapes = [batch.latents.shape[1:] if batch.latents is not None else None for batch in batches]
        return Batch.cat([batch for batch, shape in zip(batches, shapes, strict=True) if shape == shapes[0]])

    def check(self, pipeline: Pipeline) -> None:
        """See `Rows.check`."""
        for source in self.sources.values():
            if isinstance(source, Rows):
                source.check(pipeline)

    def report(self) -> str:
        """A few lines for a person: of each part its share, and what the part says of itself."""
        total = sum(self.config.weights.values())
        lines = []
        for name, source in self.sources.items():
            told = "endless" if isinstance(self.config.parts[name], WorldsConfig) else source.report()  # type: ignore[attr-defined]
            lines.append(f"{self.config.weights[name] / total:.1%} {name}: {told}")
        return "\n".join(lines)

    def _singles(self, name: str, places: list[int]) -> Iterator[Batch]:
        """The samples at places of a part's stream, which follow each other; read together where that is faster."""
        source = self.sources[name]
        if isinstance(source, Rows | Folder) and places:
            batch = _named(name, source.span(places[0], places[-1] + 1))
            yield from (batch.part(slice(row, row + 1)) for row in range(len(batch)))
        else:
            yield from (_named(name, source.batch(place, 1)) for place in places)


def _named(name: str, batch: Batch) -> Batch:
    batch.ids = [f"{name}/{each}" for each in batch.ids]
    return batch


class Deal:
    """Deals the places of a stream out to parts. In every `BLOCK` of places they have their shares, rounded, in another order."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights or min(weights) <= 0:
            raise UserError(f"a mixture must have weights above 0, got {list(weights)}")
        exact = [BLOCK * weight / sum(weights) for weight in weights]
        self.counts = [int(number) for number in exact]
        rest = sorted(range(len(exact)), key=lambda part: self.counts[part] - exact[part])
        for part in rest[: BLOCK - sum(self.counts)]:
            self.counts[part] += 1
        if min(self.counts) == 0:
            raise UserError(f"a mixture must have weights of at least 1/{BLOCK} of their sum, got {list(weights)}")
        self.seed = seed
        self._block: Callable[[int], tuple[Tensor, Tensor]] = lru_cache(maxsize=4)(self._deal)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) the part that each of these places belongs to, and which place of the part's own stream it is."""
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
