"""Paths between data and noise, and what a network may predict about them.

Everything is done on the linear path,

    x_t = (1 - t) x0 + t eps,    v = dx_t/dt = eps - x0

(Lipman et al. 2022, eq. 20 and Liu et al. 2022, eq. 1, with time reversed: here t = 0 is data.) Of the quantities x0, eps,
v and score each gives the others at known (x, t); every conversion goes through v and stands here once.

Another Gaussian path x_u = alpha(u) x0 + sigma(u) eps is the linear one in other coordinates (Karras et al. 2022, section 2):
with c = alpha + sigma, x_u = c x_t at t = sigma / c, where both have one signal-to-noise ratio. So a path is a function from its
own time u in [0, 1] (0 is data) to a `Point`, and solvers, guidance and losses need to know none but the linear one.

Times are (B,) or any shape that broadcasts against x from the left: (B, 1, F) gives the frames of a video (B, C, F, H, W)
their own. They are kept in the precision that they come in; ValueError outside [0, 1].
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mezzotint.flow.domain import above, within

Prediction = Literal["velocity", "data", "noise", "score", "vp_velocity"]
Network = Callable[[Tensor, Tensor], Tensor]

# Data cannot be told from noise-free input at t = 0, nor noise at t = 1: the divisions below stop here.
T_MIN = 1e-3


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` with trailing axes of length one, so that it broadcasts against `x` from the left."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The point of the path at time `t`. Shapes: (B, ...), (B, ...), (B,) -> (B, ...)."""
    within(0, 1, t=t)
    return x0 + like(t, x0) * (eps - x0)


def to_velocity(prediction: Tensor, kind: Prediction, x: Tensor, t: Tensor) -> Tensor:
    """The velocity that a prediction of some kind implies at (x, t).

    "vp_velocity" is a eps - b x0 with a, b = (1 - t, t) / n and n^2 = (1 - t)^2 + t^2 (Salimans & Ho 2022, appendix D), of the
    variance-preserving point x / n. Divides by t for "data" and by 1 - t for "noise" and "score"; both are kept at least `T_MIN`.
    """
    within(0, 1, t=t)
    t = like(t, x)
    if kind == "velocity":
        return prediction
    if kind == "data":
        return (x - prediction) / t.clamp_min(T_MIN)
    if kind == "noise":
        return (prediction - x) / (1 - t).clamp_min(T_MIN)
    if kind == "score":
        return -(x + t * prediction) / (1 - t).clamp_min(T_MIN)
    if kind == "vp_velocity":
        n = _norm(t)
        return (n * prediction - (1 - 2 * t) * x) / n**2
    raise ValueError(f"kind must be velocity, data, noise, score or vp_velocity, got {kind!r}")


def from_velocity(v: Tensor, kind: Prediction, x: Tensor, t: Tensor) -> Tensor:
    """What a velocity says of data, noise, score or the VP velocity at (x, t). The score divides by t, kept at least `T_MIN`."""
    within(0, 1, t=t)
    t = like(t, x)
    if kind == "velocity":
        return v
    if kind == "data":
        return x - t * v
    if kind == "noise":
        return x + (1 - t) * v
    if kind == "score":
        return -(x + (1 - t) * v) / t.clamp_min(T_MIN)
    if kind == "vp_velocity":
        n = _norm(t)
        return ((1 - 2 * t) * x + n**2 * v) / n
    raise ValueError(f"kind must be velocity, data, noise, score or vp_velocity, got {kind!r}")


def _norm(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 + t**2).sqrt()


def log_snr(t: Tensor) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio, log((1 - t) / t): +inf at data, -inf at noise."""
    within(0, 1, t=t)
    return (1 - t).log() - t.log()


class Point(NamedTuple):
    """What a path is at a time u: alpha, sigma and their derivatives by u, all of u's shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def scale(self) -> Tensor:
        """c = alpha + sigma: x on this path is c times x on the linear one."""
        return self.alpha + self.sigma

    @property
    def t(self) -> Tensor:
        """The time at which the linear path has this signal-to-noise ratio."""
        return self.sigma / self.scale

    @property
    def log_snr(self) -> Tensor:
        """Half the logarithm of the signal-to-noise ratio, log(alpha / sigma)."""
        return self.alpha.log() - self.sigma.log()


Path = Callable[[Tensor], Point]


def to_linear(prediction: Tensor, kind: Prediction, x: Tensor, point: Point) -> Tensor:
    """The velocity on the linear path, at (x / c, t), that a prediction made at x on another path implies.

    Data, noise and VP velocity are the same on all paths of one signal-to-noise ratio; a score scales by c; the path's own
    velocity is v_u = (W v + c' x) / c with the Wronskian W = alpha sigma' - sigma alpha'.
    """
    c = like(point.scale, x)
    if kind == "velocity":
        wronskian, d_scale = like(_wronskian(point), x), like(point.d_alpha + point.d_sigma, x)
        return (c * prediction - d_scale * x) / wronskian
    return to_velocity(c * prediction if kind == "score" else prediction, kind, x / c, point.t)


def from_linear(v: Tensor, kind: Prediction, x: Tensor, point: Point) -> Tensor:
    """The inverse of `to_linear`: what velocity v of the linear path is at x on another path, as a prediction of some kind."""
    c = like(point.scale, x)
    if kind == "velocity":
        wronskian, d_scale = like(_wronskian(point), x), like(point.d_alpha + point.d_sigma, x)
        return (wronskian * v + d_scale * x) / c
    prediction = from_velocity(v, kind, x / c, point.t)
    return prediction / c if kind == "score" else prediction


def _wronskian(point: Point) -> Tensor:
    return point.alpha * point.d_sigma - point.sigma * point.d_alpha


def linear(u: Tensor) -> Point:
    """The linear path itself."""
    within(0, 1, u=u)
    one = torch.ones_like(u)
    return Point(1 - u, u, -one, one)


def vp_linear(u: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Point:
    """Variance preserving, beta linear in time (Song et al. 2021b, eq. 33): DDPM's schedule in continuous time."""
    within(0, 1, u=u)
    above(0, beta_min=beta_min, beta_max=beta_max)
    slope = beta_max - beta_min
    return _from_beta(beta_min + slope * u, beta_min * u + slope * u**2 / 2)


def vp_scaled_linear(u: Tensor, beta_min: float = 0.85, beta_max: float = 12.0) -> Point:
    """Variance preserving, square root of beta linear in time (Rombach et al. 2022): Stable Diffusion's, in continuous time."""
    within(0, 1, u=u)
    above(0, beta_min=beta_min, beta_max=beta_max)
    low, slope = math.sqrt(beta_min), math.sqrt(beta_max) - math.sqrt(beta_min)
    return _from_beta((low + slope * u) ** 2, low**2 * u + low * slope * u**2 + slope**2 * u**3 / 3)


def vp_cosine(u: Tensor, offset: float = 0.008) -> Point:
    """Variance preserving, alpha a cosine (Nichol & Dhariwal 2021, eq. 17), without their cap on beta: alpha ends at 0.

    ValueError for offset <= 0; without one the path is `trigflow`.
    """
    within(0, 1, u=u)
    above(0, offset=offset)
    rate = math.pi / 2 / (1 + offset)
    start, angle = rate * offset, rate * (u + offset)
    alpha = angle.cos().clamp_min(0) / math.cos(start)
    # cos^2 a - cos^2 b = sin(b - a) sin(b + a): 1 - alpha^2 without cancellation.
    sigma = (torch.sin(rate * u) * torch.sin(rate * (u + 2 * offset))).sqrt() / math.cos(start)
    return _preserving(alpha, sigma, -rate * angle.sin() / math.cos(start))


def vp_shifted_cosine(u: Tensor, ratio: float = 1.0) -> Point:
    """Variance preserving, sigma / alpha = ratio tan(pi u / 2) (Hoogeboom et al. 2023, section 2.1); ratio is side / 64 there."""
    within(0, 1, u=u)
    above(0, ratio=ratio)
    a, b = torch.cos(math.pi / 2 * u).clamp_min(0), ratio * torch.sin(math.pi / 2 * u)
    n = (a**2 + b**2).sqrt()
    rate = math.pi / 2 * ratio / n**2  # of the angle atan(b / a)
    return Point(a / n, b / n, -rate * b / n, rate * a / n)


def trigflow(u: Tensor) -> Point:
    """x = cos(theta) x0 + sin(theta) eps with theta = pi u / 2 (Lu & Song 2024, section 3), for data of unit variance.

    Their velocity is by theta and is the "vp_velocity" of `Prediction`.
    """
    return vp_shifted_cosine(u, 1.0)


def edm(u: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Point:
    """Variance exploding: alpha = 1, sigma^(1/rho) linear from sigma_min to sigma_max (Karras et al. 2022, eq. 5)."""
    within(0, 1, u=u)
    above(0, sigma_min=sigma_min, rho=rho)
    above(sigma_min, sigma_max=sigma_max)
    low = sigma_min ** (1 / rho)
    slope = sigma_max ** (1 / rho) - low
    root = low + slope * u
    return Point(torch.ones_like(u), root**rho, torch.zeros_like(u), rho * slope * root ** (rho - 1))


def zero_terminal_snr(path: Path) -> Path:
    """A variance-preserving path that ends in pure noise: alpha moved and scaled (Lin et al. 2024, algorithm 1)."""

    def rescaled(u: Tensor) -> Point:
        point, first, last = path(u), path(torch.zeros_like(u)), path(torch.ones_like(u)).alpha
        factor = first.alpha / (first.alpha - last)
        alpha = (point.alpha - last) * factor
        # 1 - alpha, from differences of sigma^2 where those of alpha would cancel.
        less = first.sigma**2 / (1 + first.alpha) + factor * (point.sigma**2 - first.sigma**2) / (first.alpha + point.alpha)
        return _preserving(alpha, (less * (1 + alpha)).clamp_min(0).sqrt(), point.d_alpha * factor)

    return rescaled


def _from_beta(beta: Tensor, integral: Tensor) -> Point:
    """alpha = exp(-integral of beta / 2), and sigma where alpha is nearly 1 too."""
    alpha = (-integral / 2).exp()
    return _preserving(alpha, (-torch.expm1(-integral)).sqrt(), -beta / 2 * alpha)


def _preserving(alpha: Tensor, sigma: Tensor, d_alpha: Tensor) -> Point:
    """With the slope of sigma from alpha^2 + sigma^2 = 1; infinite where sigma starts as a square root, and cut off at sigma = `T_MIN`."""
    return Point(alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp_min(T_MIN))


def own_time(path: Path, t: Tensor) -> Tensor:
    """The path's own time u whose signal-to-noise ratio is the linear path's at t, by bisection; at an end if there is none."""
    within(0, 1, t=t)
    low, high = torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
    for _ in range(52):
        middle = (low + high) / 2
        below = path(middle).t < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).to(t)


def from_continuous(network: Network, path: Path, kind: Prediction) -> Network:
    """A network of another path as a denoise function of the linear one. network(x, u): x on its path, u in its own time.

    Times beyond the ends of the path are read at the ends (`_readable`), and so are those at which noise or score say nothing of data.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        ends = path(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device)).t
        where = _readable(t, kind, ends).to(t)
        u = own_time(path, where)
        point, seen = path(u), like(_norm(where) / _norm(t), x) * x
        there = like(point.scale, x) * seen
        return _as_seen(to_linear(network(there, u), kind, there, point), seen, where, x, t)

    return denoise


def from_discrete(network: Network, alphas_cumprod: Tensor, kind: Prediction) -> Network:
    """A network of discrete time as a denoise function: those of DDPM, Stable Diffusion, DiT. network(x, i): x of unit
    variance, i the fractional index into alphas_cumprod (N,), falling.

    Between two indices i is linear in t, which is finite even where the signal-to-noise ratio is zero; times beyond the table are
    read at its ends (`_readable`). ValueError where the network predicts noise, or the score, and the table ends in pure noise.
    """
    table = table_times(alphas_cumprod)
    if kind in ("noise", "score") and alphas_cumprod[-1] == 0:
        raise ValueError(f"kind {kind!r} says nothing of data at a signal-to-noise ratio of zero, where alphas_cumprod ends")

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        times = table.to(t.device, non_blocking=True)
        where = _readable(t, kind, times)
        right = torch.searchsorted(times, where.contiguous()).clamp(1, len(times) - 1)
        index = right - 1 + (where - times[right - 1]) / (times[right] - times[right - 1])
        where = where.to(t)
        n, unit = like(_norm(where), x), x / like(_norm(t), x)
        prediction = network(unit, index.to(t))
        v = to_velocity(prediction / n if kind == "score" else prediction, kind, n * unit, where)
        return _as_seen(v, n * unit, where, x, t)

    return denoise


def table_times(alphas_cumprod: Tensor) -> Tensor:
    """(N,) times in float64 at which the linear path has the signal-to-noise ratios of a table, rising."""
    _check_table(alphas_cumprod)
    abar = alphas_cumprod.double()
    return 1 / (1 + (abar / (1 - abar)).sqrt())


def _readable(t: Tensor, kind: Prediction, times: Tensor) -> Tensor:
    """The nearest time in float64 that a network knows, of those from times[0] to times[-1]; for noise and score at most 1 - `T_MIN`."""
    last = times[-1].clamp_max(1 - T_MIN) if kind in ("noise", "score") else times[-1]
    return t.double().clamp(times[0], last)


def _as_seen(v: Tensor, seen: Tensor, where: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """v at (seen, where) as the velocity at (x, t): beyond the noisy end of what a network knows, the one that leads to the same data."""
    t = like(t, x)
    return torch.where(t > like(where, x), (x - from_velocity(v, "data", seen, where)) / t, v)


def from_edm(network: Network, sigma_data: float = 0.5) -> Network:
    """EDM's raw network F as a denoise function (Karras et al. 2022, table 1). network(c_in x, c_noise), x of variance sigma^2 more
    than the data's. It is read at times from `T_MIN` to 1 - `T_MIN`, that is sigma from 0.001 to 999.
    """
    above(0, sigma_data=sigma_data)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        where = t.clamp(T_MIN, 1 - T_MIN)
        sigma = where / (1 - where)
        total = (sigma**2 + sigma_data**2).sqrt()
        there = x / like(1 - where, x)
        raw = network(there / like(total, x), sigma.log() / 4)
        x0 = like((sigma_data / total) ** 2, x) * there + like(sigma * sigma_data / total, x) * raw
        return to_velocity(x0, "data", x, t)

    return denoise


def ddpm_table(steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> Tensor:
    """alphas_cumprod (steps,) in float64 of beta linear in the index (Ho et al. 2020, section 4)."""
    within(1, math.inf, steps=steps)
    within(0, 1, beta_min=beta_min, beta_max=beta_max)
    return (1 - torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)).cumprod(0)


def scaled_linear_table(steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> Tensor:
    """alphas_cumprod (steps,) in float64 of Stable Diffusion: the square root of beta is linear in the index."""
    within(1, math.inf, steps=steps)
    within(0, 1, beta_min=beta_min, beta_max=beta_max)
    return (1 - torch.linspace(math.sqrt(beta_min), math.sqrt(beta_max), steps, dtype=torch.float64) ** 2).cumprod(0)


def cosine_table(steps: int = 1000, cap: float = 0.999) -> Tensor:
    """alphas_cumprod (steps,) in float64 of `vp_cosine`, with each beta at most `cap` (Nichol & Dhariwal 2021, eq. 17)."""
    within(1, math.inf, steps=steps)
    within(0, 1, cap=cap)
    abar = vp_cosine(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).alpha ** 2
    return (abar[1:] / abar[:-1]).clamp_min(1 - cap).cumprod(0)


def zero_terminal_table(alphas_cumprod: Tensor) -> Tensor:
    """`zero_terminal_snr` of a table: the last entry becomes 0, the first stays."""
    _check_table(alphas_cumprod)
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _check_table(alphas_cumprod: Tensor) -> None:
    inside = (alphas_cumprod >= 0) & (alphas_cumprod < 1)
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2 or not bool(inside.all()) or not bool((alphas_cumprod.diff() < 0).all()):
        raise ValueError("alphas_cumprod must be two numbers or more that fall within [0, 1)")
