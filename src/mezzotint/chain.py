"""Where it fits: stages of a model's life in a row, by one command: trained, judged, shown on one page.

In: `Part`, a stage as data: its folder, its run, the stage whose pipeline it starts from, the suites that judge it; `run`, which does
what is not done yet and writes the report; `SUITES`, what a suite measures of a stage and what the table shows of it.
Out: which stages there are (`speedrun`, `lifecycle`), how one is trained (`train`), how the page looks (`evals.report`).
Gotchas: a stage that is done is never done again, so one that was done with other settings is an error.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from mezzotint import __version__
from mezzotint.bars import Show, shown
from mezzotint.errors import UserError
from mezzotint.evals import features, pairs, rewards, subject, worlds
from mezzotint.evals.report import Stage, render
from mezzotint.flow.solvers import network_calls
from mezzotint.pictures import grid, png_bytes
from mezzotint.pipeline import Pipeline, find_device, load
from mezzotint.train.evaluation import EvaluationConfig
from mezzotint.train.log import peak_memory, read
from mezzotint.train.trainer import RunConfig, Trainer
from mezzotint.weights.files import read_json

PROMPTS_PER_TASK = {"xs": 4, "s": 50, "m": 100, "l": 100}  # by the one dial; the other counts of a suite follow

Result = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """A suite of `evals` as stages are judged by it.

    file: of its numbers, in a stage's folder. measure(pipeline, folder, prompts a task, progress). scores: a result as columns of the
    report's table. draws: whether it judges pictures; what is not judged by any draws none for the report.
    """

    file: str
    measure: Callable[[Pipeline, Path, int, Show], Result]
    scores: Callable[[Result], dict[str, float]]
    draws: bool = True


def worlds_scores(result: Result) -> dict[str, float]:
    """Of the suite "worlds": the judge's tasks and mean, held-out compositions, the look, and what a picture costs."""
    sampling = result["protocol"]["sampling"]
    return {
        "judge": result["score"],
        **result["tasks"],
        "held-out": result["heldout"],
        "preference": result["preference"],
        f"FD-{features.NAME}": result[f"fd_{features.NAME}"],
        "diversity": result["diversity"],
        "network calls": network_calls(sampling["solver"], sampling["steps"]),
        "seconds per image": result["seconds_per_image"],
    }


SUITES: dict[str, Suite] = {
    "worlds": Suite(
        "evaluation.json",
        lambda pipeline, _, prompts, show: worlds.evaluate(pipeline, worlds.Protocol(prompts), progress=show),
        worlds_scores,
    ),
    "pairs": Suite(
        "evaluation-pairs.json",
        lambda _, folder, prompts, show: pairs.evaluate(str(folder), batches=min(16, prompts), progress=show),
        lambda result: {"held-out pairs right": result["accuracy"], "log loss of pairs": result["log_loss"]},
        draws=False,
    ),
    "subject": Suite(
        "evaluation-subject.json",
        lambda pipeline, _, prompts, show: subject.evaluate(pipeline, subject.Protocol(min(64, 2 * prompts), min(20, prompts)), show),
        lambda result: {"subject fidelity": result["fidelity"], "drift of its class": result["drift"], "other prompts": result["others"]},
    ),
}


@dataclass(frozen=True)
class Part:
    """One stage of a chain: where it lives, what a reader calls it, its run, and the suites that judge it.

    start: the stage beside it from whose export it starts, which is then the run's `init`; none: from scratch.
    """

    folder: Path
    title: str
    config: RunConfig
    start: str = ""
    suites: tuple[str, ...] = ("worlds",)

    def __post_init__(self) -> None:
        self.config.evaluation = EvaluationConfig(best="")  # all stages are judged at their ends, and none ends before
        if self.start:
            self.config.init = str(self.folder.parent / self.start / "export")

    @property
    def draws(self) -> bool:
        """Whether there are pictures to show of it."""
        return any(SUITES[name].draws for name in self.suites)


def run(title: str, folder: Path, parts: Sequence[Part], prompts: Sequence[str], effort: int, progress: Progress) -> Path:
    """Do what is not done yet, stage by stage; returns the path of the report.

    prompts: drawn with the same seeds by all stages. effort: prompts a task of the suites. UserError for a folder that holds another chain.
    """
    for part in parts:
        _do(part, effort, progress)
    drawn = [load(part.folder).to(find_device())(list(prompts)) if part.draws else torch.empty(0, 3, 0, 0) for part in parts]
    grid(torch.cat([images for images in drawn if len(images)]), columns=len(prompts), scale=4).save(folder / "pictures.png")
    stages = [_stage(part, images) for part, images in zip(parts, drawn, strict=True)]
    report = folder / "report.html"
    report.write_text(render(title, stages, list(prompts), dict(_facts([part.folder for part in parts]))))
    return report


def _do(part: Part, effort: int, progress: Progress) -> None:
    """Train and judge one stage, as far as that is not done."""
    folder = part.folder
    missing = [SUITES[name] for name in part.suites if not (folder / SUITES[name].file).exists()]
    if not missing:
        if RunConfig.from_data(read_json(folder / "config.json")) != part.config:
            raise UserError(f"{folder} holds a stage with other settings; choose another folder with --out, or remove it")
        return
    pipeline = Trainer(part.config, folder, progress=progress).run()
    for suite in missing:
        start = time.perf_counter()
        result = suite.measure(pipeline, folder, effort, shown(progress, f"{folder.name}: evaluation"))
        result["seconds"] = time.perf_counter() - start
        unfinished = folder / f"{suite.file}.part"
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        unfinished.replace(folder / suite.file)


def _results(folder: Path) -> Iterator[tuple[Suite, Result]]:
    """What is known of a stage."""
    for suite in SUITES.values():
        if (folder / suite.file).exists():
            yield suite, json.loads((folder / suite.file).read_text())


def _stage(part: Part, images: Tensor) -> Stage:
    log = read(part.folder / "metrics.jsonl")
    of_student = any("loss" in line for line in log)
    trained = next((key for line in log for key in line if key == "loss" or (not of_student and key.endswith(".loss"))), "loss")
    return Stage(
        name=part.folder.name,
        title=part.title,
        scores={name: score for suite, result in _results(part.folder) for name, score in suite.scores(result).items()},
        curve=[(line["step"], line[trained]) for line in log if trained in line],
        held_out_curve=[(line["step"], line["held_out"]) for line in log if of_student and "held_out" in line],  # it is the student's
        images=[png_bytes(image) for image in images],
        notes={"training": f"{_seconds(log):.0f} s", "method": part.config.method.kind, **rewards.told(log)},
    )


def _seconds(log: Sequence[Result]) -> float:
    return max(line.get("seconds", 0.0) for line in log)


def _facts(folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """What a reader must know to run it again."""
    seconds = sum(_seconds(read(folder / "metrics.jsonl")) for folder in folders)
    seconds += sum(result["seconds"] for folder in folders for _, result in _results(folder))
    parameters = sum(p.numel() for p in load(folders[0]).parameters())
    yield "command", shlex.join(["mezzotint", *sys.argv[1:]])
    yield "time", f"{seconds / 60:.1f} minutes of training and evaluation"
    yield "peak memory", f"{peak_memory(find_device()):.2f} GB"
    yield "model", f"{parameters / 1e6:.2f} M parameters"
    yield "machine", f"{_processor()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    yield "versions", f"mezzotint {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    yield "commit", _commit()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of the checkout that the package runs from."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"
