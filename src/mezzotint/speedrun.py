"""The front door: the whole life of a model in one command.

Worlds -> pre-training -> fine-tuning on the preferred look -> preference optimisation -> distillation to four steps, an
evaluation of every stage, and one page that shows it all. Every stage is an ordinary run of an ordinary recipe; stopped
at any point, the same command goes on from there.
"""

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from mezzotint import __version__
from mezzotint.evals import features, worlds
from mezzotint.evals.report import Stage, render
from mezzotint.flow.solvers import network_calls
from mezzotint.pictures import grid, png_bytes
from mezzotint.pipeline import Pipeline, load
from mezzotint.recipes import post, tiny
from mezzotint.train.evaluation import EvaluationConfig
from mezzotint.train.log import read
from mezzotint.train.trainer import RunConfig, Trainer

PROMPTS_PER_TASK = {"xs": 4, "s": 50, "m": 100, "l": 100}
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Part:
    """One stage of the run: where it lives, what it is, and its recipe's configuration."""

    folder: Path
    title: str
    config: RunConfig


def parts(folder: Path, size: tiny.SizeName) -> list[Part]:
    """The stages, each starting from what the one before it exported."""
    chain = [
        ("pretrain", "Pre-training", tiny.worlds(size)),
        ("sft", "Fine-tuning on the preferred look", post.sft(size)),
        ("dpo", "Preference optimisation", post.dpo(size)),
        ("distil", "Distillation to 4 steps", post.consistency(size)),
    ]
    for (before, _, _), (_, _, config) in pairwise(chain):
        config.init = str(folder / before / "export")
        config.evaluation = EvaluationConfig()  # every stage is evaluated at its end, and none ends before
    return [Part(folder / name, title, config) for name, title, config in chain]


def speedrun(folder: Path, size: tiny.SizeName, progress: Progress) -> Path:
    """Run what is not done yet; returns the path of the report."""
    whole = parts(folder, size)
    for part in whole:
        if (part.folder / EVALUATION_FILE).exists():
            continue
        pipeline = Trainer(part.config, part.folder, progress=progress).run()
        _evaluate(pipeline, part.folder, PROMPTS_PER_TASK[size], progress)
    drawn = [load(part.folder)(tiny.PREVIEWS) for part in whole]  # the same prompts and seeds through all stages
    grid(torch.cat(drawn), columns=len(tiny.PREVIEWS), scale=4).save(folder / "pictures.png")
    stages = [_stage(part, images) for part, images in zip(whole, drawn, strict=True)]
    report = folder / "report.html"
    report.write_text(render("Mezzotint speedrun", stages, list(tiny.PREVIEWS), dict(_facts(whole))))
    return report


def _evaluate(pipeline: Pipeline, folder: Path, prompts: int, progress: Progress) -> None:
    task = progress.add_task(f"{folder.name}: evaluation", total=None)
    start = time.perf_counter()
    result = worlds.evaluate(
        pipeline, worlds.Protocol(prompts), progress=lambda done, total: progress.update(task, completed=done, total=total)
    )
    result["seconds"] = time.perf_counter() - start
    part = folder / f"{EVALUATION_FILE}.part"
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(folder / EVALUATION_FILE)


def scores(result: dict[str, Any]) -> dict[str, float]:
    """An evaluation as the columns of the report's table."""
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


def _stage(part: Part, images: Tensor) -> Stage:
    log = read(part.folder / "metrics.jsonl")
    return Stage(
        name=part.folder.name,
        title=part.title,
        scores=scores(json.loads((part.folder / EVALUATION_FILE).read_text())),
        curve=[(line["step"], line["loss"]) for line in log if "loss" in line],
        held_out_curve=[(line["step"], line["held_out"]) for line in log if "held_out" in line],
        images=[png_bytes(image) for image in images],
        notes={"training": f"{max(line.get('seconds', 0.0) for line in log):.0f} s", "method": part.config.method.kind},
    )


def _facts(whole: list[Part]) -> Iterator[tuple[str, str]]:
    """What a reader must know to run it again."""
    seconds = sum(max(line.get("seconds", 0.0) for line in read(part.folder / "metrics.jsonl")) for part in whole)
    seconds += sum(json.loads((part.folder / EVALUATION_FILE).read_text())["seconds"] for part in whole)
    parameters = sum(p.numel() for p in load(whole[0].folder).parameters())
    yield "command", shlex.join(["mezzotint", *sys.argv[1:]])
    yield "time", f"{seconds / 60:.1f} minutes of training and evaluation"
    yield "peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB"
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
