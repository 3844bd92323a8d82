"""Checkpoints: safetensors and JSON in one folder per step, written whole or not at all.

A folder is written under another name, flushed to the disk, and renamed; a process killed at any instant leaves the last
whole checkpoint untouched. Nothing is pickled, so loading one cannot run code.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from mezzotint.errors import UserError

Tensors = dict[str, Tensor]
STATE = "state.json"


def write(folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], keep: int = 2) -> Path:
    """Write checkpoint `step` and remove all but the `keep` newest. UserError where the disk does not take it."""
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in group.items()}, part / f"{name}.safetensors")
        (part / STATE).write_text(json.dumps(state))
        for file in part.iterdir():
            _flush(file)
        _flush(part)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        kept = f"; the last whole one is {steps(folder)[-1].name}" if steps(folder) else ""
        raise UserError(f"cannot write checkpoint {final}: {error}; free some space and run the same command again{kept}") from error
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def read(checkpoint: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The tensors and the state of one checkpoint. UserError where it is damaged: it names the file and what to do."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        tensors = {file.stem: load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged ({error}); remove that folder to go on from the one before it") from error
    return tensors, state


def optimizer_tensors(optimizer: Optimizer) -> Tensors:
    """The state of an optimizer as named tensors: "3.exp_avg" is `exp_avg` of its parameter number 3."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: Optimizer, tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        whole["state"].setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(whole)
