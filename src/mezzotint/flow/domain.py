"""Where arguments may lie: a ValueError that names the argument and its range, for whoever asks beyond it. NaN lies nowhere.

A tensor on an accelerator is taken on trust, since looking at it would make the accelerator wait, and so is one that is being compiled.
"""

import math

import torch
from torch import Tensor


def within(low: float, high: float, **arguments: float | Tensor) -> None:
    """ValueError for an argument outside [low, high]."""
    for name, value in arguments.items():
        least, most = _range(value)
        if not (low <= least and most <= high):
            raise ValueError(f"{name} must be within [{low:g}, {high:g}], got {_shown(least, most)}")


def above(low: float, **arguments: float | Tensor) -> None:
    """ValueError for an argument that is not finite and above `low`."""
    for name, value in arguments.items():
        least, most = _range(value)
        if not (low < least and most < math.inf):
            raise ValueError(f"{name} must be finite and above {low:g}, got {_shown(least, most)}")


def _range(value: float | Tensor) -> tuple[float, float]:
    """The least and the largest number of an argument; NaN where there is one, and nothing that could be wrong where none is looked at."""
    if not isinstance(value, Tensor):
        return value, value
    if not value.is_cpu or torch.compiler.is_compiling() or not value.numel():
        return math.inf, -math.inf
    least, most = torch.aminmax(value)
    return least.item(), most.item()


def _shown(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"values from {least:g} to {most:g}"
