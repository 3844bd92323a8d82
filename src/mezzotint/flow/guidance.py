"""Guidance: functions that turn denoise functions into a denoise function."""

from collections.abc import Callable

import torch
from torch import Tensor

from mezzotint.flow.path import like
from mezzotint.flow.solvers import Denoise

Branches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cfg(conditional: Denoise, both: Branches, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) in the scale where 1 is off:

        v = v_u + scale (v_c - v_u)

    limited to times inside `interval`; outside it only the conditional branch is called (Kynkaanniemi et al. 2024).
    both(x, t) gives (v_c, v_u), in one batched network call or two; which of them must not change the result.
    Each item of a batch goes by its own time.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        inside = (t >= interval[0]) & (t <= interval[1])
        if scale == 1 or not inside.any():
            return conditional(x, t)
        v_c, v_u = both(x, t)
        v = v_u + scale * (v_c - v_u)
        return v if inside.all() else torch.where(like(inside, x), v, v_c)

    return denoise
