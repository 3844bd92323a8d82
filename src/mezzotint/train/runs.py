"""The runs of a folder: what each one is and has reached, how two differ, and what of a finished one can go."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.errors import UserError
from mezzotint.places import CONFIG_FILE
from mezzotint.train import checkpoint
from mezzotint.train.log import read


@dataclass(frozen=True)
class Found:
    """A run. step: the last that is logged. held_out, best: the last and the best held-out loss of its stage. size: bytes on the disk.

    prunable: bytes of checkpoints that a finished run no longer needs.
    """

    name: str
    method: str
    step: int
    steps: int
    finished: bool
    loss: float | None
    held_out: float | None
    best: float | None
    seconds: float
    size: int
    prunable: int


def found(folder: Path) -> list[Path]:
    """The folders of runs in a folder, and in those within; one that is a run itself is the only one. UserError where there is none."""
    runs = sorted(path.parent for path in folder.glob("**/config.json") if (path.parent / "checkpoints").is_dir())
    if not runs:
        raise UserError(f"no runs in {folder}; say where they are, as in: mezzotint runs path/to/runs")
    return runs


def describe(run: Path, root: Path) -> Found:
    """What a run's folder says of it."""
    config, log = _config(run), read(run / "metrics.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    held = [line["held_out"] for line in log if "held_out" in line and line.get("stage") == log[-1].get("stage")]
    finished = (run / "export" / CONFIG_FILE).is_file()
    return Found(
        name=str(run.relative_to(root)) if run != root else run.name,
        method=config["method"]["kind"],
        step=max((line["step"] for line in log), default=0),
        steps=config["train"]["steps"],
        finished=finished,
        loss=losses[-1] if losses else None,
        held_out=held[-1] if held else None,
        best=min(held, default=None),
        seconds=max((line.get("seconds", 0.0) for line in log), default=0.0),
        size=_bytes(run),
        prunable=_bytes(run / "checkpoints") if finished else 0,
    )


def compare(runs: list[Path]) -> dict[str, list[Any]]:
    """The dotted settings in which runs differ, with the value of each; None where a run has no such setting."""
    settings = [dict(_flat(_config(run))) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = {name: [each.get(name) for each in settings] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def prune(run: Path) -> None:
    """Remove the checkpoints of a finished run. What it exported, logged and drew stays; it can no longer go on, and need not."""
    assert (run / "export" / CONFIG_FILE).is_file()
    for step in checkpoint.steps(run / "checkpoints"):
        shutil.rmtree(step)


def _config(run: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{run / 'config.json'} is damaged ({error}); remove that run or restore the file") from error
    return config


def _flat(data: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(data, dict):
        return [(name, data)]
    return [pair for key, value in data.items() for pair in _flat(value, f"{name}.{key}".lstrip("."))]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
