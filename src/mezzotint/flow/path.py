"""The linear path between data and noise, and what a network may predict about it.

    x_t = (1 - t) x0 + t eps,    v = dx_t/dt = eps - x0

(Lipman et al. 2022, eq. 20 and Liu et al. 2022, eq. 1, with time reversed: here t = 0 is data.) Of the four quantities
x0, eps, v and score each gives the other three at known (x, t); every conversion goes through v and stands here once.
Times are (B,) or any shape that broadcasts against x from the left; they are kept in the precision that they come in.
"""

from typing import Literal

from torch import Tensor

Prediction = Literal["velocity", "data", "noise", "score"]

# Data cannot be told from noise-free input at t = 0, nor noise at t = 1: the divisions below stop here.
T_MIN = 1e-3


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` with trailing axes of length one, so that it broadcasts against `x` from the left."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The point of the path at time `t`. Shapes: (B, ...), (B, ...), (B,) -> (B, ...)."""
    return x0 + like(t, x0) * (eps - x0)


def to_velocity(prediction: Tensor, kind: Prediction, x: Tensor, t: Tensor) -> Tensor:
    """The velocity that a prediction of some kind implies at (x, t).

    Divides by t for "data" and by 1 - t for "noise" and "score"; both are kept at least `T_MIN`.
    """
    t = like(t, x)
    if kind == "velocity":
        return prediction
    if kind == "data":
        return (x - prediction) / t.clamp_min(T_MIN)
    if kind == "noise":
        return (prediction - x) / (1 - t).clamp_min(T_MIN)
    if kind == "score":
        return -(x + t * prediction) / (1 - t).clamp_min(T_MIN)
    raise ValueError(f"kind must be velocity, data, noise or score, got {kind!r}")


def from_velocity(v: Tensor, kind: Prediction, x: Tensor, t: Tensor) -> Tensor:
    """What a velocity says of data, noise or score at (x, t). The score divides by t, kept at least `T_MIN`."""
    t = like(t, x)
    if kind == "velocity":
        return v
    if kind == "data":
        return x - t * v
    if kind == "noise":
        return x + (1 - t) * v
    if kind == "score":
        return -(x + (1 - t) * v) / t.clamp_min(T_MIN)
    raise ValueError(f"kind must be velocity, data, noise or score, got {kind!r}")


def log_snr(t: Tensor) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio, log((1 - t) / t): +inf at data, -inf at noise."""
    return (1 - t).log() - t.log()
