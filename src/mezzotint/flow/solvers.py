"""From noise to data along the learned flow: one function per solver, all with one signature.

    solver(denoise, x, times, *, generator) -> iterator of Step

denoise(x, t) gives the velocity at x (B, ...) and t (B,). times (N + 1,) runs from 1 down to 0. generator is one
torch.Generator per sample (or one for all); only stochastic solvers draw from it. A solver yields after each step, so
that previews, progress bars and cancellation need no callback; the last step's x is the sample.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mezzotint.flow.path import like

Denoise = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, slots=True)
class Step:
    """The state after a step: time reached, sample there, and the clean data that the network saw in it."""

    t: Tensor
    x: Tensor
    x0: Tensor


class Solver(Protocol):
    """What every solver looks like."""

    def __call__(self, denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]: ...


def randn_like(x: Tensor, generator: Generators) -> Tensor:
    """Normal noise of x's shape. With one generator per row a row's noise does not depend on its neighbours.

    Generators live on the CPU whatever the device of x, so that noise is the same everywhere.
    """
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"generator must be one per sample: {len(generator)} generators for {len(x)} samples")
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generator])
    else:
        noise = torch.randn(x.shape, generator=generator)
    return noise.to(x)


def _pairs(x: Tensor, times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The grid's steps (t, s) as (B,) tensors."""
    for t, s in zip(times[:-1].to(x), times[1:].to(x), strict=True):
        yield t.expand(len(x)), s.expand(len(x))


def euler(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Euler's method, order 1. On the linear path it is DDIM with eta = 0 (Song et al. 2021a, eq. 12)."""
    for t, s in _pairs(x, times):
        v = denoise(x, t)
        x0 = x - like(t, x) * v
        x = x + like(s - t, x) * v
        yield Step(s, x, x0)


def heun(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Heun's method, order 2, two network calls a step and one on the last (Karras et al. 2022, algorithm 1)."""
    for t, s in _pairs(x, times):
        v = denoise(x, t)
        x0 = x - like(t, x) * v
        y = x + like(s - t, x) * v
        x = y if s[0] == 0 else x + like(s - t, x) * (v + denoise(y, s)) / 2
        yield Step(s, x, x0)


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """DPM-Solver++(2M), order 2, one network call a step (Lu et al. 2022b, algorithm 2).

    With lambda = log((1 - t) / t), which is -inf at pure noise and +inf at data: the first step out of t = 1 and the last
    one into t = 0 have no finite step in lambda and are of first order.
    """
    previous: Tensor | None = None
    h_previous = torch.full((len(x),), torch.inf)
    for t, s in _pairs(x, times):
        x0 = x - like(t, x) * denoise(x, t)
        h = ((1 - s) / s).log() - ((1 - t) / t).log()
        estimate = x0
        if previous is not None and bool(h.isfinite().all() and h_previous.isfinite().all()):
            estimate = x0 + like(h / (2 * h_previous), x) * (x0 - previous)
        ratio = torch.where(t > 0, s / t, 0.0)
        x = like(ratio, x) * x + like(1 - s - ratio * (1 - t), x) * estimate
        previous, h_previous = x0, h
        yield Step(s, x, x0)


def consistency(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to data, add fresh noise, jump again.

    For networks whose x - t v is already the end of the path. Stochastic from the second step on.
    """
    for t, s in _pairs(x, times):
        x0 = x - like(t, x) * denoise(x, t)
        x = x0 if s[0] == 0 else x0 + like(s, x) * (randn_like(x, generator) - x0)
        yield Step(s, x, x0)


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "consistency": consistency}


def network_calls(solver: str, steps: int) -> int:
    """How often a solver of `SOLVERS` calls the network in so many steps; guidance may double the work of each call."""
    return 2 * steps - 1 if solver == "heun" else steps
