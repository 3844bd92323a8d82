"""Every technique on one, two and four ranks, and in one, two and four micro-batches: how far their losses are from each other.

All runs of a technique learn from the same samples with the same random numbers, in steps of four parts of one to three samples each:
four micro-batches of one rank, or of two or four ranks (gloo), or joined to two micro-batches or to one. They differ in the order of
sums only. A number is the largest |loss - loss of the first run| over the mean |loss| of the first run, in all steps; `first.` is that
of the first step, before any rounding has been learnt from. The level is 1e-5. `nudged` is how much rounding comes to in a technique: the
first run again, from weights of which each was moved up or down by one in its last place.

Where parts are joined, what a technique draws for a sample has to be what it would have drawn for it apart. So each part keeps its own
generator, every draw is made of theirs, and stratified times are those of the parts. ReFL draws for half of the captions of a
micro-batch, so that its parts are not joined.

    python bench/ranks.py [--only dpo dmd ...] [--steps 50] [--out FOLDER]

Runs that are whole in FOLDER are not made again.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "methods"), str(TESTS / "train")]

from techniques import LOSSES, METHODS, PAIRED, VISION, of_method  # noqa: E402
from tiny_runs import tiny_pipeline, tiny_run  # noqa: E402
from together import SOURCES, Job, SourceName, together  # noqa: E402

from mezzotint.data.batch import Batch  # noqa: E402
from mezzotint.data.worlds import Worlds, WorldsConfig  # noqa: E402
from mezzotint.flow import time  # noqa: E402
from mezzotint.methods import lcm  # noqa: E402
from mezzotint.methods.denoise import DenoiseConfig  # noqa: E402
from mezzotint.train.log import read  # noqa: E402
from mezzotint.train.trainer import RunConfig, Trainer, _mixed  # noqa: E402

PARTS = 4  # of a step
ALONE = "ranks1"  # what the others are compared with
RANKS = {ALONE: 1, "ranks2": 2, "ranks4": 4}
JOINED = {"micro2": 2, "micro1": 1}  # micro-batches of a step
NUDGED = "nudged"
KINDS = [*RANKS, *JOINED, NUDGED]
HALVES = ("refl",)  # do with half of a micro-batch what others do with all of it
EVERY = {"denoise": DenoiseConfig(), **METHODS}


def configuration(name: str, steps: int) -> RunConfig:
    """A technique at the size of the tests, four micro-batches a step."""
    config = of_method(tiny_run(EVERY[name], pairs=name in PAIRED, steps=steps))
    config.train.accumulate = PARTS
    return config


def source_of(name: str) -> SourceName:
    return "coupled" if name == "reflow" else "uneven"


class Draws(TorchDispatchMode):
    """Within, rows of random tensors come from the generators of the parts whose they are. sizes: samples of each; none: no parts."""

    def __init__(self) -> None:
        super().__init__()
        self.generators: list[torch.Generator] = []
        self.sizes: list[int] = []

    def rows(self, total: int) -> list[int]:
        """How many of so many rows belong to each part. ValueError where samples have not all as many."""
        each, left = divmod(total, sum(self.sizes))
        if left:
            raise ValueError(f"cannot share {total} rows among parts of {self.sizes} samples")
        return [each * size for size in self.sizes]

    def each(self, function: Callable[..., Tensor], arguments: Sequence[Sequence[Any]], **keywords: Any) -> Tensor:
        """A function for every part, with the random numbers of that part."""
        drawn, sizes, own = [], self.sizes, torch.default_generator.get_state()
        self.sizes = []
        for given, generator in zip(arguments, self.generators, strict=True):
            torch.default_generator.set_state(generator.get_state())
            drawn.append(function(*given, **keywords))
            generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(own)
        self.sizes = sizes
        return torch.cat(drawn)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords, name = keywords or {}, function.overloadpacket.__name__
        if not self.sizes or name not in DRAWN or keywords.get("generator") is not None:
            return function(*arguments, **keywords)
        if name in ("rand_like", "randn_like", "multinomial"):
            parts = [(x, *arguments[1:]) for x in arguments[0].split(self.rows(len(arguments[0])))]
        elif name == "randperm":
            parts = [(n,) for n in self.rows(arguments[0])]
        else:
            *bounds, (first, *others) = arguments
            parts = [(*bounds, [n, *others]) for n in self.rows(first)]
        return self.each(function, parts, **keywords)


DRAWN = ("rand", "randn", "randint", "rand_like", "randn_like", "randperm", "multinomial")
DRAWS = Draws()


class Joined:
    """A source whose batches are several neighbouring ones of another. sizes: of the parts of the last batch of every stream."""

    def __init__(self, source: Worlds, streams: int) -> None:
        self.source, self.streams, self.version, self.held_out = source, streams, source.version, source.held_out
        self.sizes: dict[int, list[int]] = {}

    def batch(self, number: int, size: int) -> Batch:
        joined = PARTS // self.streams
        parts = [self.source.batch(joined * number + m, size) for m in range(joined)]
        DRAWS.sizes = self.sizes[number % self.streams] = [len(part) for part in parts]
        return Batch.cat(parts)


class Joining(Trainer):
    """A trainer whose micro-batches are several of four, each with its own random numbers."""

    def _seed(self, micro: int, *place: int) -> None:
        super()._seed(micro, *place)
        assert isinstance(self.source, Joined)
        joined = PARTS // self.source.streams
        seeds = [_mixed(self.config.train.seed, m, self.step, *place) for m in range(joined * micro, joined * (micro + 1))]
        DRAWS.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        DRAWS.sizes = self.source.sizes.get(micro, [])

    def _after_step(self, metrics: dict[str, Tensor], stopping: bool) -> None:
        DRAWS.sizes = []  # evaluation is not of parts
        super()._after_step(metrics, stopping)


@contextmanager
def times_of_parts() -> Iterator[None]:
    """Stratified times are of a part's strata."""
    real = time.stratified

    def apart(number: int) -> Tensor:
        return DRAWS.each(real, [(n,) for n in DRAWS.rows(number)]) if DRAWS.sizes else real(number)

    owners: tuple[Any, ...] = (time, lcm)
    for owner in owners:
        owner.stratified = apart
    try:
        yield
    finally:
        for owner in owners:
            owner.stratified = real


def join(folder: Path, config: RunConfig, streams: int, source: SourceName) -> None:
    """Train in so many micro-batches what has four."""
    config = config.replace(train=config.train.replace(accumulate=streams))
    assert isinstance(config.data, WorldsConfig)
    with DRAWS, times_of_parts():
        Joining(config, folder, Joined(SOURCES[source](config.data), streams)).run()  # type: ignore[arg-type]


def nudge(folder: Path, config: RunConfig, source: SourceName) -> None:
    """Train from weights that are others in their last place."""
    assert isinstance(config.data, WorldsConfig)
    trainer = Trainer(config, folder, SOURCES[source](config.data))
    generator = torch.Generator().manual_seed(0)
    for parameters in trainer.parameters.values():
        for p in parameters:
            towards = torch.where(torch.rand(p.shape, generator=generator) < 0.5, torch.inf, -torch.inf)
            p.data.copy_(p.detach().nextafter(towards))
    trainer.run()


def losses(name: str, folder: Path) -> list[float]:
    """Of a technique's run, step by step."""
    return [line[key] for line in read(folder / "metrics.jsonl") if (key := LOSSES.get(name, "loss")) in line]


def curves(name: str, steps: int, out: Path) -> dict[str, list[float]]:
    """The losses of a technique's runs."""
    config, source = configuration(name, steps), source_of(name)
    found = {}
    for kind in KINDS:
        folder = out / f"{name}-{kind}"
        if kind in JOINED and name in HALVES:
            continue
        if len(losses(name, folder)) < steps or not (folder / "export").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if kind in JOINED:
                join(folder, config, JOINED[kind], source)
            elif kind == NUDGED:
                nudge(folder, config, source)
            elif any(together(RANKS[kind], [Job(folder, config, source)])):
                raise RuntimeError(f"{name} ended on {RANKS[kind]} ranks")
        found[kind] = losses(name, folder)
    return found


def differences(found: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Of every run from the first one: in the first step, and the largest, over the mean loss."""
    alone = found[ALONE]
    scale = statistics.mean(map(abs, alone))
    apart = {kind: [abs(a - b) / scale for a, b in zip(alone, curve, strict=True)] for kind, curve in found.items() if kind != ALONE}
    return {kind: (each[0], max(each)) for kind, each in apart.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(EVERY), choices=list(EVERY), metavar="NAME")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="folder of the runs; without it one that is removed afterwards")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, float | int | str] = {"torch": torch.__version__, "steps": options.steps}
    print("".join([f"{'':22}", *(f"{kind:>20}" for kind in KINDS[1:])]))
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder)) / str(options.steps)
        VISION.weights = str(out / "own")
        torch.manual_seed(0)
        tiny_pipeline().build().save(out / "own")
        for name in options.only:
            found = differences(curves(name, options.steps, out))
            cells = [f"{found[kind][0]:10.1e}{found[kind][1]:10.1e}" if kind in found else f"{'-':>20}" for kind in KINDS[1:]]
            print(f"{name:22}" + "".join(cells), flush=True)
            for kind, (first, largest) in found.items():
                result |= {f"{kind}.{name}": largest, f"first.{kind}.{name}": first}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
