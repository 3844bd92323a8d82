"""From noise to data along the learned flow: one function per solver, all with one signature.

    solver(denoise, x, times, *, generator) -> iterator of Step

denoise(x, t) gives the velocity at x (B, ...) and t. times (N + 1,) runs from 1 down to 0; (N + 1, B) or (N + 1, B, 1, F) gives
items or the frames of videos times of their own, which may stand still, and t then has that shape without the first axis.
generator is one torch.Generator per sample (or one for all); only stochastic solvers draw from it. A solver yields after each
step, so that previews, progress bars and cancellation need no callback; the last step's x is the sample. ValueError where times
leave [0, 1] or turn back.

Solvers know the linear path alone. A network of another path is read on it (`flow.path`), and what is a solver of the
variance-preserving or exploding path in its paper is the same here: all but Heun's depend on the signal-to-noise ratio only.
"""

import math
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
    """The state after a step: time t reached and sample x there; and what made it, the velocity v that was seen at (start, start_t)."""

    t: Tensor
    x: Tensor
    start: Tensor
    start_t: Tensor
    v: Tensor

    @property
    def x0(self) -> Tensor:
        """The clean data that the network saw in the step; computed when asked for, since it costs as much as a step."""
        return self.start - like(self.start_t, self.start) * self.v


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


def _checked(x: Tensor, times: Tensor, *, up: bool = False, down: bool = True) -> Tensor:
    """times as (N + 1, B, ...) in x's precision, which must rise or fall as allowed."""
    if len(times) < 2 or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"times must be at least two and within [0, 1], got {len(times)} from {times.min():g} to {times.max():g}")
    change = times.diff(dim=0)
    if not (down and bool((change <= 0).all())) and not (up and bool((change >= 0).all())):
        raise ValueError(f"times must {'rise or fall' if up and down else 'rise' if up else 'fall'} within [0, 1] without turning back")
    return times.to(x)[:, None].expand(-1, len(x)) if times.ndim == 1 else times.to(x)


def _pairs(times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps (t, s) of a grid."""
    for i in range(len(times) - 1):
        yield times[i], times[i + 1]


def _line(x: Tensor, t: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """x + (s - t) v, with one temporary."""
    return (like(s - t, x) * v).add_(x)


def euler(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Euler's method, order 1. On the linear path it is DDIM with eta = 0 (Song et al. 2021a, eq. 12).

    Rising times invert: they lead from data to the noise that it came from, as exactly as the order allows.
    """
    times = _checked(x, times, up=True)
    for t, s in _pairs(times):
        v = denoise(x, t)
        start, x = x, _line(x, t, s, v)
        yield Step(s, x, start, t, v)


def heun(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Heun's method, order 2, two network calls a step and one on the last (Karras et al. 2022, algorithm 1). Rising times invert."""
    times = _checked(x, times, up=True)
    for t, s in _pairs(times):
        v = denoise(x, t)
        start, x = x, _line(x, t, s, v)
        if s.any():
            slope = (v + denoise(x, s)).mul_(like(s - t, x)).div_(2)
            x = torch.where(like(s > 0, x), slope.add_(start), x)
        yield Step(s, x, start, t, v)


def edm(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    churn: float = 0.0,
    sigmas: tuple[float, float] = (0.0, math.inf),
    noise: float = 1.0,
) -> Iterator[Step]:
    """The sampler of EDM (Karras et al. 2022, algorithm 2): Heun's method in y = x / (1 - t) over sigma = t / (1 - t), order 2.

    churn, sigmas, noise: their S_churn, [S_tmin, S_tmax] and S_noise; without churn nothing is drawn. The step out of t = 1, where
    sigma is infinite, is Heun's in x over t, and nothing is added there.
    """
    times = _checked(x, times)
    gamma = min(churn / (len(times) - 1), math.sqrt(2) - 1)
    for t, s in _pairs(times):
        if gamma:
            x, t = _churned(x, t, gamma, sigmas, noise, generator)
        v = denoise(x, t)
        start, x = x, _line(x, t, s, v)
        if s.any():
            v_s = denoise(x, s)
            # eps = dy / dsigma at both ends; the Euler step is the same in both coordinates.
            eps, eps_s = start + like(1 - t, x) * v, x + like(1 - s, x) * v_s
            ratio = (1 - s) / (1 - t)
            in_sigma = like(ratio, x) * start + like(s - t * ratio, x) * (eps + eps_s) / 2
            in_t = start + like(s - t, x) * (v + v_s) / 2
            x = torch.where(like(s > 0, x), torch.where(like(t < 1, x), in_sigma, in_t), x)
        yield Step(s, x, start, t, v)


def _churned(x: Tensor, t: Tensor, gamma: float, sigmas: tuple[float, float], noise: float, generator: Generators) -> tuple[Tensor, Tensor]:
    """Noise added until sigma has grown by 1 + gamma, where it lies within `sigmas`."""
    sigma = t / (1 - t)
    grows = (sigma >= sigmas[0]) & (sigma <= sigmas[1]) & (t < 1)
    higher = torch.where(grows, t * (1 + gamma) / (1 + t * gamma), t)
    added = (1 - higher) * sigma * math.sqrt((1 + gamma) ** 2 - 1) * noise
    moved = like((1 - higher) / (1 - t), x) * x + like(added, x) * randn_like(x, generator)
    return torch.where(like(grows, x), moved, x), higher


def _toward(x: Tensor, t: Tensor, s: Tensor, data: Tensor, down: Tensor) -> Tensor:
    """The point (1 - s) data + down eps, with eps the noise that x at t holds beside `data`.

    For down = s this is the exponential integrator's step, (s / t) x - (1 - s) (e^-h - 1) data with h the step in log((1 - t) / t),
    of every solver in that variable: they differ in what they hold to be the data. Finite at t = 1 and s = 0.
    """
    ratio = torch.where(t > 0, down / t, 0.0)
    return (like(ratio, x) * x).add_(like(1 - s - ratio * (1 - t), x) * data)


def _split(t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(down, up): how much of the noise at s is kept and how much is drawn anew. down^2 + up^2 = s^2.

    up = eta s sqrt(1 - q^2), with q = e^-h the ratio of sigma / alpha at s and t (Song et al. 2021a, eq. 16).
    """
    moved = torch.where(s < t, (t - s) / (t * (1 - s)), 0.0)  # 1 - q, without cancellation
    up = eta * s * (moved * (2 - moved)).sqrt()
    return (s**2 - up**2).clamp_min(0).sqrt(), up


def ddim(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2021a, eq. 12): eta = 0 is Euler's method, eta = 1 ancestral sampling. ValueError for eta outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be within [0, 1], got {eta}")
    times = _checked(x, times)
    for t, s in _pairs(times):
        v = denoise(x, t)
        start = x
        if eta:
            down, up = _split(t, s, eta)
            x = _toward(x, t, s, x - like(t, x) * v, down)
            if up.any():
                x = x.add_(randn_like(x, generator).mul_(like(up, x)))
        else:
            x = _line(x, t, s, v)
        yield Step(s, x, start, t, v)


def ddpm(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, eq. 7): DDIM with eta = 1. Order 1 in distribution."""
    return ddim(denoise, x, times, generator=generator, eta=1.0)


def _extrapolation(times: Tensor) -> tuple[Tensor, Tensor]:
    """(h, k): the steps in lambda = log((1 - t) / t), and h / (2 h_previous), 0 where either is infinite or nothing moves."""
    h = ((1 - times) / times).log().diff(dim=0)
    k = torch.zeros_like(h)
    k[1:] = h[1:] / (2 * h[:-1])
    return h, torch.where(k.isfinite() & h.isfinite(), k, 0.0)


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver++(2M), order 2, one network call a step (Lu et al. 2022b, algorithm 2); eta = 1 is its SDE form (section 5).

    With lambda = log((1 - t) / t), which is -inf at pure noise and +inf at data: the first step out of t = 1 and the last
    one into t = 0 have no finite step in lambda and are of first order.
    """
    times = _checked(x, times)
    previous: Tensor | None = None
    for (t, s), k in zip(_pairs(times), _extrapolation(times)[1], strict=True):
        v = denoise(x, t)
        x0 = (like(-t, x) * v).add_(x)
        data = x0 if previous is None else (x0 - previous).mul_(like(k, x)).add_(x0)
        down, up = _split(t, s, eta) if eta else (s, None)
        start, x = x, _toward(x, t, s, data, down)
        if up is not None and up.any():
            x = x.add_(randn_like(x, generator).mul_(like(up, x)))
        previous = x0
        yield Step(s, x, start, t, v)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` with the noise of `ddpm` (Lu et al. 2022b, section 5)."""
    return dpmpp_2m(denoise, x, times, generator=generator, eta=1.0)


def unipc(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """UniPC-2, B(h) = e^h - 1, one network call a step (Zhao et al. 2023, algorithms 5 and 7, data prediction).

    The predictor is DPM-Solver++(2M). The call that it makes at s then corrects the step that led there: the same
    exponential step, with the data along it extrapolated through the new estimate too. Steps of infinite h are not corrected.
    """
    times = _checked(x, times)
    h, k = _extrapolation(times)
    a, b = _correction(h, k)
    before: tuple[Tensor, Tensor, Tensor] | None = None  # of the last step: where it began, the data seen there and one earlier
    for i, (t, s) in enumerate(_pairs(times)):
        v = denoise(x, t)
        start, x0 = x, (like(-t, x) * v).add_(x)
        if before is not None and bool(h[i - 1].isfinite().any()):
            origin, last, earlier = before
            data = last + like(a[i - 1], x) * (last - earlier) + like(b[i - 1], x) * (x0 - last)
            corrected = _toward(origin, times[i - 1], t, data, t)
            x = torch.where(like(h[i - 1].isfinite(), x), corrected, x)
        earlier = x0 if before is None else before[1]
        before = (x, x0, earlier)
        x = _toward(x, t, s, (x0 - earlier).mul_(like(k[i], x)).add_(x0), s)
        yield Step(s, x, start, t, v)


def _correction(h: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (a, b) of data_t - data_previous and data_s - data_t in UniPC's corrector of a step h from t to s.

    They solve R rho = b of Zhao et al. 2023, eq. 10 for r = (-h_previous / h, 1); without a previous step, b = 1/2 and a = 0.
    """
    wide, k = h.double(), k.double()
    first = (torch.expm1(-wide) / -wide - 1) / torch.expm1(-wide)
    second = 2 * ((torch.expm1(-wide) / -wide - 1) / -wide - 0.5) / torch.expm1(-wide)
    r = -1 / (2 * k)
    old = (first - second) / (1 - r)
    a = torch.where(k > 0, -old / r, 0.0)
    b = torch.where(k > 0, first - old, 0.5)
    still = ~h.isfinite() | (h == 0)
    return torch.where(still, 0.0, a).to(h), torch.where(still, 0.0, b).to(h)


def flow_sde(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None, level: float = 0.7) -> Iterator[Step]:
    """Euler-Maruyama of the flow's SDE (Liu et al. 2025, Flow-GRPO, eq. 9); level = 0 is Euler's method. Order 1 in distribution.

    The last step, into s = 0, adds no noise: it would stay in the sample. `transition`, `log_prob` and `kl` say the rest.
    """
    times = _checked(x, times)
    for t, s in _pairs(times):
        v = denoise(x, t)
        mean, std = transition(x, v, t, s, level)
        start, x = x, mean
        if std.any():
            x = x + like(std, x) * randn_like(x, generator)
        yield Step(s, x, start, t, v)


def transition(x: Tensor, v: Tensor, t: Tensor, s: Tensor, level: float = 0.7) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the flow SDE's step from t to s < t, with g = level sqrt(t / (1 - t)):

        mean = x (1 + g^2 dt / 2t) + v (1 + g^2 (1 - t) / 2t) dt,    std = g sqrt(-dt),    dt = s - t

    At t = 1 the 1 - t in g is that of s. std has t's shape, and is 0 at s = 0.
    """
    g2 = torch.where(s > 0, level**2 * t / (1 - torch.where(t == 1, s, t)), 0.0)
    g2 = torch.where(s < t, g2, 0.0)
    dt, half = s - t, torch.where(t > 0, g2 / (2 * t), 0.0)
    mean = x * like(1 + half * dt, x) + v * like((1 + half * (1 - t)) * dt, x)
    return mean, (g2 * -dt).sqrt()


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) log-density of a step that ended at x, the mean over elements, as Flow-GRPO's clipping expects. ValueError where std is 0."""
    if not bool((std > 0).all()):
        raise ValueError("std must be above 0: a step without noise has no density")
    std = like(std, x)
    density = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """(B,) Kullback-Leibler divergence between two steps of one std, the mean over elements. ValueError where std is 0."""
    if not bool((std > 0).all()):
        raise ValueError("std must be above 0: a step without noise has no density")
    return ((mean - reference) ** 2 / (2 * like(std, mean) ** 2)).flatten(1).mean(1)


def consistency(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to data, add fresh noise, jump again.

    For networks whose x - t v is already the end of the path. Stochastic from the second step on.
    """
    times = _checked(x, times)
    for t, s in _pairs(times):
        v = denoise(x, t)
        start, x = x, x - like(t, x) * v
        if s.any():
            x = x + like(s, x) * (randn_like(x, generator) - x)
        yield Step(s, x, start, t, v)


def invert(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None, iterations: int = 5) -> Iterator[Step]:
    """The inverse of `euler` on the same times turned round: from data at 0 up to the noise that it came from.

    Solves x_t = x_s + (t - s) v(x_t, t) by fixed-point iteration from x_s (Pan et al. 2023, AIDI, eq. 8), so many network calls a
    step. Converges where (t - s) |dv/dx| < 1. ValueError for iterations < 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    times = _checked(x, times, up=True, down=False)
    for s, t in _pairs(times):
        start = x
        for _ in range(iterations):
            v = denoise(x, t)
            x = _line(start, s, t, v)
        yield Step(t, x, start, s, v)


def log_likelihood(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Tensor:
    """(B,) log-density of data x under the flow, in nats (Song et al. 2021b, eq. 39): Heun's method over rising times (N + 1,).

        log p(x) = log N(x_1) + integral over t of div v, with div v ~ probe . (dv/dx) probe

    for one vector of signs per sample and trajectory (Hutchinson); unbiased, exact where dv/dx is a multiple of the identity.
    """
    times = _checked(x, times, up=True, down=False)
    probe = torch.where(randn_like(x, generator) < 0, -torch.ones_like(x), torch.ones_like(x))

    def with_divergence(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = denoise(x, t)
            (pulled,) = torch.autograd.grad((v * probe).sum(), x)
        return v.detach(), (pulled * probe).flatten(1).sum(1)

    total = torch.zeros(len(x)).to(x)
    for t, s in _pairs(times):
        v, divergence = with_divergence(x, t)
        v_s, divergence_s = with_divergence(_line(x, t, s, v), s)
        x = _line(x, t, s, (v + v_s) / 2)
        total = total + (s - t) * (divergence + divergence_s) / 2
    return total - (x**2 + math.log(2 * math.pi)).flatten(1).sum(1) / 2


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "ddpm": ddpm,
    "heun": heun,
    "edm": edm,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "flow_sde": flow_sde,
    "consistency": consistency,
}


def network_calls(solver: str, steps: int) -> int:
    """How often a solver of `SOLVERS` calls the network in so many steps; guidance may double the work of each call."""
    return 2 * steps - 1 if solver in ("heun", "edm") else steps
