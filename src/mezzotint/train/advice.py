"""The cheapest change that makes a run fit, by trying: every change is planned."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mezzotint.train.devices import Device
from mezzotint.train.plan import Plan, Setup, plan
from mezzotint.train.trainer import RunConfig

MOST_GPUS, RANK = 1024, 16
Run = tuple[RunConfig, Setup]


@dataclass(frozen=True)
class Change:
    """A change, in words, the run that it makes, and what that needs."""

    words: str
    run: Run
    plan: Plan


def advice(config: RunConfig, setup: Setup, device: Device) -> list[Change]:
    """The first single change that is enough, or else changes on top of each other until they are, or until there is none left.

    In the order of what they cost: checkpointing, half the micro-batch and twice the accumulation, more GPUs, LoRA, optimizer states
    in 8 bits. Where evaluation does not fit, fewer pictures at once come first. Nothing for a run that fits.
    """
    run, made, done = (config, setup), plan(config, setup, device), list[Change]()
    if made.peak_eval_gb > made.memory_gb:
        done += _applied(_smaller_evaluation, run, device)
        run = done[-1].run if done else run
    if (done[-1].plan if done else made).fits:
        return done
    for changes in CHANGES:
        alone = _applied(changes, run, device)
        if alone and alone[0].plan.fits:
            return done + alone
    for changes in CHANGES:
        done += _applied(changes, run, device)
        if done and done[-1].plan.fits:
            break
        run = done[-1].run if done else run
    return done


def _applied(changes: "Changes", run: Run, device: Device) -> list[Change]:
    """The mildest of the changes of a kind that is enough, or the last one; none where there is nothing to change."""
    change = None
    for words, changed in changes(*run):
        change = Change(words, changed, plan(*changed, device))
        if change.plan.fits:
            break
    return [change] if change else []


Changes = Callable[[RunConfig, Setup], Iterator[tuple[str, Run]]]


def _smaller_evaluation(config: RunConfig, setup: Setup) -> Iterator[tuple[str, Run]]:
    while max(config.train.held_out, config.pipeline.sampling.batch) > 1:
        held_out, drawn = max(1, config.train.held_out // 2), max(1, config.pipeline.sampling.batch // 2)
        pipeline = replace(config.pipeline, sampling=config.pipeline.sampling.replace(batch=drawn))
        config = config.replace(train=config.train.replace(held_out=held_out), pipeline=pipeline)
        yield f"--train.held-out {held_out} --pipeline.sampling.batch {drawn}", (config, setup)


def _checkpointing(config: RunConfig, setup: Setup) -> Iterator[tuple[str, Run]]:
    if not setup.checkpointing:
        yield "--checkpointing", (config, replace(setup, checkpointing=True))


def _smaller_batches(config: RunConfig, setup: Setup) -> Iterator[tuple[str, Run]]:
    train = config.train
    while train.batch > 1 and train.batch % 2 == 0:
        # GPUs that have no second micro-batch yet get one, so that a step has as many pictures as before.
        train = train.replace(batch=train.batch // 2, accumulate=2 * max(train.accumulate, setup.gpus // setup.context))
        yield f"--train.batch {train.batch} --train.accumulate {train.accumulate}", (config.replace(train=train), setup)


def _more_gpus(config: RunConfig, setup: Setup) -> Iterator[tuple[str, Run]]:
    while setup.gpus < MOST_GPUS:
        setup = replace(setup, gpus=2 * setup.gpus)
        yield f"--gpus {setup.gpus}", (config, setup)


def _lora(config: RunConfig, setup: Setup) -> Iterator[tuple[str, Run]]:
    if not setup.lora:
        yield f"--lora {RANK}", (config, replace(setup, lora=RANK))


def _eight_bit(config: RunConfig, setup: Setup) -> Iterator[tuple[str, Run]]:
    if config.optim.name == "adamw":
        yield "--optim.name adamw8", (config.replace(optim=config.optim.replace(name="adamw8")), setup)


CHANGES: tuple[Changes, ...] = (_checkpointing, _smaller_batches, _more_gpus, _lora, _eight_bit)
