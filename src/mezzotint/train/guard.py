"""A number that is not finite stops the run, and the report says where it came from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.data.batch import Batch
from mezzotint.methods.method import Metrics, Role


class NonFiniteError(Exception):
    """A loss or gradient that is not finite. The message names the module, the time and the sample."""


def explain(what: str, step: int, roles: Mapping[str, Role], batch: Batch, metrics: Metrics, rerun: Callable[[], object]) -> NonFiniteError:
    """The error for a non-finite value at a step.

    rerun computes the same loss again, forward and backward, with the same random numbers; hooks watch it and give the first
    module (in order of computation) whose output is not finite, or else whose gradient is not.
    """
    bad = _first_bad_output(roles, rerun) or _first_bad_gradient(roles) or "no module (the loss itself)"
    rows = _bad_rows(batch, metrics)
    samples = ", ".join(f"{batch.ids[row]} ({batch.prompts[row]!r}{_time(metrics, row)})" for row in rows[:3])
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return NonFiniteError(f"{what} is not finite at step {step}: first in {bad}; samples {samples}{more}")


def _first_bad_output(roles: Mapping[str, Role], rerun: Callable[[], object]) -> str | None:
    bad: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                bad.append(name)

        return hook

    named = [(f"{role}.{name}", m) for role, part in roles.items() for name, m in part.module.named_modules() if name]
    handles = [m.register_forward_hook(watch(name)) for name, m in named]
    try:
        rerun()
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of {bad[0]}" if bad else None


def _first_bad_gradient(roles: Mapping[str, Role]) -> str | None:
    for role, part in roles.items():
        for name, p in reversed(list(part.module.named_parameters())):
            if p.grad is not None and not p.grad.isfinite().all():
                return f"the gradient of {role}.{name}"
    return None


def _bad_rows(batch: Batch, metrics: Metrics) -> list[int]:
    """The samples whose pictures or losses are not finite; all of them where single ones cannot be told."""
    bad = ~batch.images.isfinite().flatten(1).all(1)
    losses = metrics.get("loss")
    if losses is not None and losses.shape == bad.shape:
        bad |= ~losses.isfinite()
    rows = torch.nonzero(bad).flatten().tolist()
    return rows or list(range(len(batch)))


def _time(metrics: Metrics, row: int) -> str:
    return f", t = {float(metrics['t'][row]):.4f}" if "t" in metrics else ""
