"""The planner against what happens: peak memory of training and of evaluation on this machine's CPU, planned and measured.

Each recipe runs in a process of its own, from the building of the trainer through as many steps as it takes for long captions to come,
then an evaluation. Measured is what torch's allocator had given out at most, as its profiler tells it. `ratio` is planned over measured;
the level is 0.85 to 1.15 for all of them. `over_pretraining` is the peak of a recipe over that of `tiny.worlds`, planned and measured.

    python bench/plan.py [--size xs] [--only tiny.worlds tiny.dpo ...]
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import WorldsConfig
from mezzotint.recipes import RECIPES
from mezzotint.train.devices import DEVICES
from mezzotint.train.heldout import heldout_loss
from mezzotint.train.plan import Imagined, Setup, plan
from mezzotint.train.trainer import RunConfig, Trainer

NAMES = ("tiny.worlds", "tiny.sft", "tiny.dpo", "tiny.consistency", "tiny.dmd", "tiny.images", "tiny.lcm_lora")


class Wordy:
    """Worlds' pictures under the captions that a plan assumes of a folder's."""

    version = "wordy"

    def __init__(self, config: RunConfig) -> None:
        self.worlds, self.said = WorldsConfig(size=config.data.size).build(), Imagined(config).said

    def batch(self, number: int, size: int) -> Batch:
        return replace(self.worlds.batch(number, size), prompts=[self.said] * size)

    def held_out(self, size: int) -> Batch:
        return self.batch(0, size)


def measured(config: RunConfig) -> dict[str, float]:
    """Peaks in bytes of a few steps and of an evaluation, in this process. Suites of evaluation are not measured, nor planned."""
    config = replace(config, evaluation=config.evaluation.replace(suite=""))
    source = config.data.build() if isinstance(config.data, WorldsConfig) else Wordy(config)
    steps = config.data.long_every if isinstance(config.data, WorldsConfig) else 2
    gc.collect()  # what others left would else be freed while it is counted, and the peak seem lower
    with tempfile.TemporaryDirectory() as folder, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer = Trainer(config, Path(folder), source)
        for step in range(steps):
            trainer.step = step
            with record_function("peak.train"):
                trainer._train_step()
        batch = source.held_out(config.train.held_out)  # drawing pictures is not what is planned
        with record_function("peak.eval"):
            heldout_loss(trainer.pipeline, batch)
            trainer.pipeline(config.train.preview_prompts or batch.prompts[:8], steps=2)
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    windows = [(e.name().removeprefix("peak."), e.start_ns(), e.end_ns()) for e in events if e.name().startswith("peak.")]
    now, peaks = 0, {"train": 0.0, "eval": 0.0}
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            for name, start, end in windows:
                if start <= event.start_ns() <= end:
                    peaks[name] = max(peaks[name], now)
    return peaks


def planned(config: RunConfig) -> dict[str, float]:
    """The same two peaks in bytes by the planner."""
    made = plan(config, Setup(precision="float32", lora=config.adapter.rank), next(iter(DEVICES.values())))
    return {"train": 1e9 * made.peak_train_gb, "eval": 1e9 * made.peak_eval_gb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="xs")
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME")
    parser.add_argument("--measure", action="store_true", help="measure one recipe in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measured(RECIPES[options.only[0]](options.size))))
        return
    result: dict[str, float | str] = {"torch": torch.__version__, "size": options.size}
    peaks: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.only:
        command = [sys.executable, __file__, "--size", options.size, "--measure", "--only", name]
        words = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[name] = {"measured": json.loads(words.splitlines()[-1]), "planned": planned(RECIPES[name](options.size))}
        for window in ("train", "eval"):
            ours, real = peaks[name]["planned"][window], peaks[name]["measured"][window]
            result |= {f"measured_mb.{window}.{name}": real / 1e6, f"ratio.{window}.{name}": ours / real}
        if name != "tiny.worlds" and "tiny.worlds" in peaks:
            for who in ("planned", "measured"):
                result[f"over_pretraining.{who}.{name}"] = peaks[name][who]["train"] / peaks["tiny.worlds"][who]["train"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
