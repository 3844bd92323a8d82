"""Where arguments may lie: a ValueError that names the argument and its range, for whoever asks beyond it. NaN lies nowhere.

A tensor on an accelerator is taken on trust, since looking at it would make the accelerator wait, and so is one that is being compiled.
"""

import torch
from torch import Tensor


def within(low: float, high: float, **arguments: float | Tensor) -> None:
    """ValueError for an argument outside [low, high]."""
    for name, value in arguments.items():
        if not (_all((value >= low) & (value <= high)) if isinstance(value, Tensor) else low <= value <= high):
            raise ValueError(f"{name} must be within [{low:g}, {high:g}], got {_shown(value)}")


def above(low: float, **arguments: float | Tensor) -> None:
    """ValueError for an argument that is not finite and above `low`."""
    for name, value in arguments.items():
        if not (_all((value > low) & value.isfinite()) if isinstance(value, Tensor) else low < value < float("inf")):
            raise ValueError(f"{name} must be finite and above {low:g}, got {_shown(value)}")


def _all(true: Tensor) -> bool:
    return not true.is_cpu or torch.compiler.is_compiling() or bool(true.all())


def _shown(value: float | Tensor) -> str:
    return f"values from {value.min():g} to {value.max():g}" if isinstance(value, Tensor) else f"{value:g}"
