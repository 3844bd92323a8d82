"""What training costs beside the networks: the loop, a checkpoint, the machine's matrix rate, and a script of the usual kind.

`sgemm_share`  the step of the tiny recipe: (model FLOPs of a step / its time) / (rate of a square sgemm around it), median over rounds.
`overhead`     the share of the run's time that is neither forward, backward nor update, at a step of about 20 ms, with batches that
               cost nothing. The difference between a long and a short run, so that the start and the end of both cancel. Clipping and
               the moving average belong to the update, being arithmetic on the weights; `clip_and_average` is their share alone.
`checkpoint_pause`  how long the loop waits for a checkpoint, when it is due and until it is copied, over the time that writing the same
               one takes; the first one of a run, which also takes the memory for the copies, apart. What copying and writing take from
               the steps beside them is not in it.
`peer_ratio`   images a second of ours over those of a loop of accelerate's kind that trains diffusers' class of the same network with
               the same weights on the same batch: clipping, AdamW, a moving average, a schedule, the loss read every step.

What is compared is timed alternately in one run, because the clock and the neighbours of a machine change from second to second.
Model FLOPs are those of the matrix products and attention, forward and backward, as torch counts them; everything else that a step
does (norms, activations, the optimizer, the average, drawing the data) only costs time.

    python bench/loop.py [--only overhead] [--size s] [--rounds 15]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.data.batch import Batch
from mezzotint.methods.denoise import Denoise
from mezzotint.models import Cond, MMDiTConfig
from mezzotint.recipes import tiny
from mezzotint.train import checkpoint
from mezzotint.train import trainer as trainer_module
from mezzotint.train.average import Average
from mezzotint.train.trainer import Portion, RunConfig, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))

SQUARE = 1024
SHORT, LONG = 20, 120  # steps of the runs whose difference is the loop
BATCH = 4  # of the 20 ms step
EVERY = 6  # steps from one checkpoint to the next
NEVER = 1_000_000
NETWORK = MMDiTConfig(width=256, depth=4, heads=4, channels=3, patch=2, text_width=128, pooled_width=128, table=16, base=16)
PEER_BATCH, PEER_SIDE, TEXT = 8, 32, 32


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Ready:
    """A source that has one batch, at once."""

    version = "ready"

    def __init__(self, batch: Batch) -> None:
        self.ready = batch

    def batch(self, number: int, size: int) -> Batch:
        return self.ready

    def held_out(self, size: int) -> Batch:
        return Batch(self.ready.images[:1], self.ready.prompts[:1], self.ready.ids[:1])


def sgemm_rate(a: torch.Tensor, b: torch.Tensor, times: int = 8) -> float:
    """FLOPs per second of the best of a few square products."""
    return 2 * SQUARE**3 / min(timed(lambda: torch.mm(a, b)) for _ in range(times))


def model_flops(trainer: Trainer, size: int) -> int:
    """The FLOPs of the last step's forward and backward pass; counted apart, since counting takes time."""
    batch = trainer.source.batch(trainer.loader.position - 1, size)
    with FlopCounterMode(display=False) as counter:
        trainer._accumulate([Portion(0, 0, batch)], len(batch), ("student",), 1, {})
    for optimizer in trainer.optimizers["student"]:
        optimizer.zero_grad()
    return counter.get_total_flops()


def sgemm_share(size: tiny.SizeName, rounds: int) -> dict[str, float]:
    config = tiny.worlds(size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder))
    a, b = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)
    shares, rates, seconds, images = [], [], [], []
    for number in range(rounds + 2):
        trainer.step = number
        before = sgemm_rate(a, b)
        step = timed(trainer._train_step)
        after = sgemm_rate(a, b)
        if number < 2:  # the first steps allocate
            continue
        rate = (before + after) / 2
        shares.append(model_flops(trainer, config.train.batch) / step / rate)
        rates.append(rate)
        seconds.append(step)
        images.append(config.train.batch / step)
    return {
        "sgemm_share": statistics.median(shares),
        "sgemm_gflops": statistics.median(rates) / 1e9,
        "step_ms": 1e3 * statistics.median(seconds),
        "images_per_second": statistics.median(images),
    }


def plain(steps: int, checkpoint: int = NEVER) -> RunConfig:
    """The tiny recipe at a step of about 20 ms, which looks at nothing but its log."""
    config = tiny.worlds("s")
    train = config.train.replace(steps=steps, batch=BATCH, log=10, evaluate=NEVER, checkpoint=checkpoint, held_out=1, preview_prompts=())
    return replace(config, train=train, optim=config.optim.replace(name="adamw", warmup=1))


NETWORK_WORK = [(Denoise, "loss"), (torch.Tensor, "backward"), (torch.optim.AdamW, "step"), (Optimizer, "zero_grad")]
WEIGHT_WORK = [(trainer_module, "clip_"), (Average, "update")]


@contextmanager
def counted(places: list[tuple[Any, str]], seconds: list[float]) -> Iterator[None]:
    """Adds the time that is spent in some functions."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[0] += time.perf_counter() - start
            return result

        return wrapped

    real = [getattr(owner, name) for owner, name in places]
    for (owner, name), function in zip(places, real, strict=True):
        setattr(owner, name, watched(function))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, real, strict=True):
            setattr(owner, name, function)


def run_once(steps: int, batch: Batch) -> tuple[float, float, float]:
    """Seconds of a run, those in the networks and optimizers, and those in clipping and averages."""
    network, weights = [0.0], [0.0]
    with tempfile.TemporaryDirectory() as folder, counted(NETWORK_WORK, network), counted(WEIGHT_WORK, weights):
        return timed(Trainer(plain(steps), Path(folder), Ready(batch)).run), network[0], weights[0]


def overhead(rounds: int) -> dict[str, float]:
    batch = tiny.worlds("s").data.build().batch(0, BATCH)
    shares, weight_shares, steps = [], [], []
    for _ in range(rounds):
        short = run_once(SHORT, batch)
        took, network, weights = (long - start for long, start in zip(run_once(LONG, batch), short, strict=True))
        shares.append(1 - (network + weights) / took)
        weight_shares.append(weights / took)
        steps.append(took / (LONG - SHORT))
    return {
        "overhead": statistics.median(shares),
        "clip_and_average": statistics.median(weight_shares),
        "overhead_step_ms": 1e3 * statistics.median(steps),
    }


def write_seconds(stored: Path, folder: Path) -> float:
    """How long the checkpoint that is stored takes to write again."""
    saved = checkpoint.Checkpoint(stored)
    tensors = {group: {name: torch.empty(shape) for name, shape in shapes.items()} for group, shapes in saved.shapes.items()}
    saved.fill(tensors)
    groups = {group: checkpoint.shares(named, main=True) for group, named in tensors.items()}
    return statistics.median(timed(lambda: checkpoint.write(folder, 0, groups, dict(saved.state))) for _ in range(3))


def checkpoint_pause(rounds: int) -> dict[str, float]:
    batch = tiny.worlds("s").data.build().batch(0, BATCH)
    first, later, writes = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            saves: list[float] = []
            waits: list[float] = []  # of every step before its update, for what is being copied
            with each_timed(checkpoint.Saver, "save", saves), each_timed(checkpoint.Saver, "settle", waits):
                Trainer(plain(4 * EVERY + 1, EVERY), Path(folder), Ready(batch)).run()
            pauses = [save + wait for save, wait in zip(saves, waits[EVERY::EVERY], strict=False)]
            writes.append(write_seconds(checkpoint.steps(Path(folder) / "checkpoints")[-1], Path(folder) / "again"))
            first.append(pauses[0] / writes[-1])
            later += [pause / writes[-1] for pause in pauses[1:]]  # without the last one, which follows upon another
    medians = {"checkpoint_pause": later, "first_checkpoint_pause": first}
    return {name: statistics.median(values) for name, values in medians.items()} | {"checkpoint_write_ms": 1e3 * statistics.median(writes)}


@contextmanager
def each_timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Appends the time of every call of a function."""
    real = getattr(owner, name)

    def watched(*arguments: Any, **keywords: Any) -> None:
        seconds.append(timed(lambda: real(*arguments, **keywords)))

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, real)


def peer_step(net: torch.nn.Module, batch: Batch, cond: Cond, call: Callable[..., torch.Tensor], steps: int) -> Callable[[], None]:
    """A step of a script as those of diffusers' examples are: flow matching, written on accelerate."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=steps)
    net, optimizer, schedule = accelerator.prepare(net.train(), optimizer, schedule)
    average = EMAModel(net.parameters(), decay=0.999)

    def step() -> None:
        with accelerator.accumulate(net):
            x0, eps = batch.images, torch.randn_like(batch.images)
            t = torch.randn(len(batch)).sigmoid()
            x = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * eps
            loss = (call(net, x, t, cond) - (eps - x0)).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        average.step(net.parameters())
        loss.detach().item()

    return step


def peer_ratio(rounds: int) -> dict[str, float]:
    from test_mmdit import TestMMDiT

    parity = TestMMDiT()
    ours, theirs = parity.pair(NETWORK)
    batch = Batch(torch.randn(PEER_BATCH, 3, PEER_SIDE, PEER_SIDE).clamp(-1, 1), ["a"] * PEER_BATCH, ["0"] * PEER_BATCH)
    cond = Cond(torch.randn(PEER_BATCH, TEXT, NETWORK.text_width), None, torch.randn(PEER_BATCH, NETWORK.pooled_width))
    config = plain(NEVER)
    config.pipeline = config.pipeline.replace(denoiser=NETWORK, text=config.pipeline.text.replace(width=NETWORK.text_width))
    config.method = config.method.replace(drop=0.0, level=0.0, detail=0.0)
    config.train = config.train.replace(batch=PEER_BATCH)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), Ready(batch))
    trainer.method.student.denoiser.load_state_dict(ours.state_dict())
    trainer.method.student.encode = lambda prompts: cond  # type: ignore[method-assign, assignment]
    step = peer_step(theirs, batch, cond, parity.call, NEVER)
    ratios, images = [], []
    for number in range(rounds + 2):
        seconds = {}
        for who in sorted(("ours", "theirs"), reverse=bool(number % 2)):
            seconds[who] = timed(trainer._train_step if who == "ours" else step)
        trainer.step += 1
        trainer.guard.read()
        if number >= 2:  # the first steps allocate
            ratios.append(seconds["theirs"] / seconds["ours"])
            images.append(PEER_BATCH / seconds["ours"])
    return {"peer_ratio": statistics.median(ratios), "peer_images_per_second": statistics.median(images)}


def main(arguments: Sequence[str] | None = None) -> None:
    parts = {
        "sgemm_share": lambda o: sgemm_share(o.size, o.rounds),
        "overhead": lambda o: overhead(max(1, o.rounds // 3)),
        "checkpoint_pause": lambda o: checkpoint_pause(max(1, o.rounds // 3)),
        "peer_ratio": lambda o: peer_ratio(o.rounds),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(parts), choices=list(parts), metavar="NAME")
    parser.add_argument("--size", default="s", choices=list(tiny.SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    result: dict[str, float | int | str] = {"threads": torch.get_num_threads(), "size": options.size, "torch": torch.__version__}
    for name in options.only:
        result |= parts[name](options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
