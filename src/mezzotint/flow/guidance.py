"""Guidance: functions that turn denoise functions into a denoise function."""

from collections.abc import Callable

from torch import Tensor

from mezzotint.flow.solvers import Denoise

Branches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cfg(conditional: Denoise, both: Branches, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) in the scale where 1 is off:

        v = v_u + scale (v_c - v_u)

    limited to times inside `interval`; outside it only the conditional branch is called (Kynkaanniemi et al. 2024).
    both(x, t) gives (v_c, v_u), in one batched network call or two; which of them must not change the result.
    All of a batch's times lie on one side of the interval, as they do in sampling; ValueError otherwise.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        inside = (t >= interval[0]) & (t <= interval[1])
        if scale == 1 or not inside.any():
            return conditional(x, t)
        if not inside.all():
            raise ValueError(f"times of one batch must be all inside or all outside the interval {interval}")
        v_c, v_u = both(x, t)
        return v_u + scale * (v_c - v_u)

    return denoise
