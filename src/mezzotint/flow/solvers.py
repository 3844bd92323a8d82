"""From noise to data along the learned flow: one function per solver, all with one signature.

    solver(denoise, x, times, *, generator) -> iterator of Step

denoise(x, t) gives the velocity at x (B, ...) and t. times (N + 1,) runs from 1 down to 0; (N + 1, B) or (N + 1, B, 1, F) gives
items or the frames of videos times of their own, which may stand still, and t then has that shape without the first axis. So
denoise must be finite at 0 and 1 where items stand there.
generator is one torch.Generator per sample (or one for all); only stochastic solvers draw from it. A solver yields after each
step, so that previews, progress bars and cancellation need no callback; the last step's x is the sample. ValueError, at the first
step, where times leave [0, 1] or turn back, or do not fit x.

Solvers know the linear path alone. A network of another path is read on it (`flow.path`), and what is a solver of the
variance-preserving or exploding path in its paper is the same here: all but Heun's depend on the signal-to-noise ratio only.
All are linear in x and velocities: their coefficients are computed for the whole grid at once, in float64 on the CPU. x itself is
kept in float32, or in float64 if it comes so; denoise casts it for its network.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mezzotint.flow.domain import above, within
from mezzotint.flow.path import like, log_snr

Denoise = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(slots=True)
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

    Generators live on the CPU whatever the device of x, so that noise is the same everywhere; without one, that of x's device draws.
    """
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"generator must be one per sample: {len(generator)} generators for {len(x)} samples")
        noise = torch.stack([torch.randn(x.shape[1:], generator=g, device="cpu") for g in generator])
    else:
        noise = torch.randn(x.shape, generator=generator, device=x.device if generator is None else "cpu")
    return noise.to(x)


def _begin(x: Tensor, times: Tensor, *, up: bool = False, down: bool = True) -> tuple[Tensor, Tensor]:
    """x in float32 or better, and times in float64 on the CPU, which must rise or fall as allowed.

    Those are (N + 1, 1) where all items have the same, and (N + 1, B, ...) otherwise.
    """
    times = times.detach().to("cpu", torch.float64)
    if times.ndim == 0 or times.shape[0] < 2:
        raise ValueError(f"times must be two or more within [0, 1], got {times.numel()}")
    if times.ndim == 1:
        times = times[:, None]
    elif times.ndim > x.ndim + 1 or any(n not in (1, m) for n, m in zip(times.shape[1:], x.shape, strict=False)):
        raise ValueError(f"times must be (N + 1,) or (N + 1, B, ...) and broadcast to x {tuple(x.shape)}, got {tuple(times.shape)}")
    within(0, 1, times=times)
    least, most = (change.item() for change in torch.aminmax(times.diff(dim=0)))
    if not (down and most <= 0) and not (up and least >= 0):
        raise ValueError(f"times must {'rise or fall' if up and down else 'rise' if up else 'fall'} within [0, 1] without turning back")
    return x if x.dtype == torch.float64 else x.float(), times


def _steps(x: Tensor, times: Tensor, *coefficients: Tensor) -> Iterator[tuple[Any, ...]]:
    """(t, s, ...) of each step: times as denoise takes them, and coefficients for x, as numbers where all items have the same."""
    rows = _rows(x, times)
    return zip(rows, rows[1:], *(_column(x, c) for c in coefficients), strict=False)


def _rows(x: Tensor, times: Tensor) -> tuple[Tensor, ...]:
    return times.to(x, non_blocking=True).expand(-1, x.shape[0], *times.shape[2:]).unbind()


def _column(x: Tensor, coefficient: Tensor) -> Sequence[float] | tuple[Tensor, ...]:
    if coefficient.shape[1:].numel() == 1:
        return coefficient.flatten().tolist()
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim + 1 - coefficient.ndim)).to(x, non_blocking=True).unbind()


def _plus(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """x + factor y in one pass."""
    return torch.addcmul(x, factor, y) if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _acts(coefficient: Tensor) -> list[bool]:
    """In which steps a coefficient is not zero throughout."""
    return coefficient.flatten(1).any(1).tolist()


def euler(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Euler's method, order 1. On the linear path it is DDIM with eta = 0 (Song et al. 2021a, eq. 12).

    Rising times invert: they lead from data to the noise that it came from, as exactly as the order allows.
    """
    x, times = _begin(x, times, up=True)
    for t, s, dt in _steps(x, times, times.diff(dim=0)):
        v = denoise(x, t)
        start, x = x, _plus(x, dt, v)
        yield Step(s, x, start, t, v)


def heun(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Heun's method, order 2, two network calls a step and one on the last (Karras et al. 2022, algorithm 1). Rising times invert."""
    x, times = _begin(x, times, up=True)
    dts = times.diff(dim=0)
    halves, corrects = torch.where(times[1:] > 0, dts / 2, 0.0), _acts(times[1:])
    for i, (t, s, dt, half_dt) in enumerate(_steps(x, times, dts, halves)):
        v = denoise(x, t)
        start, x = x, _plus(x, dt, v)
        if corrects[i]:
            x = _plus(x, half_dt, denoise(x, s) - v)
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

    In x it is Heun's with the second slope weighted by (1 - s) / (1 - t); out of t = 1, where sigma is infinite, we take Heun's own.
    churn, sigmas, noise: their S_churn, [S_tmin, S_tmax] and S_noise; without churn nothing is drawn. ValueError for churn or noise < 0.
    """
    within(0, math.inf, churn=churn, noise=noise)
    within(0, sigmas[1], sigmas=sigmas[0])
    x, times = _begin(x, times)
    ts, ss = times[:-1], times[1:]
    higher, keeps, ups = _churned(ts, ss, min(churn / len(ts), math.sqrt(2) - 1), sigmas)
    dts = ss - higher
    halves = torch.where(ss > 0, dts / 2, 0.0)
    lates = torch.where(higher < 1, halves * (1 - ss) / (1 - higher), halves)
    churns, corrects = _acts(ups), _acts(ss)
    steps = zip(_rows(x, higher), _steps(x, times, dts, lates, keeps, ups * noise), strict=True)
    for i, (t, (_, s, dt, late_dt, keep, up)) in enumerate(steps):
        if churns[i]:
            x = _noised(x, keep, up, generator)
        v = denoise(x, t)
        start, x = x, _plus(x, dt, v)
        if corrects[i]:
            x = _plus(x, late_dt, denoise(x, s) - v)
        yield Step(s, x, start, t, v)


def _churned(t: Tensor, s: Tensor, gamma: float, sigmas: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """(higher, keep, up): the time at which sigma has grown by 1 + gamma, where it lies within `sigmas`, and what leads there."""
    sigma = t / (1 - t)
    grows = (sigma >= sigmas[0]) & (sigma <= sigmas[1]) & (t < 1) & (s < t)
    higher = torch.where(grows, t * (1 + gamma) / (1 + t * gamma), t)
    keep = torch.where(grows, (1 - higher) / (1 - t), 1.0)
    return higher, keep, torch.where(grows, (1 - higher) * sigma * math.sqrt(gamma * (2 + gamma)), 0.0)


def _noised(x: Tensor, keep: Tensor, up: Tensor, generator: Generators) -> Tensor:
    """keep x + up z with fresh noise z."""
    return _plus(randn_like(x, generator).mul_(up), keep, x)


def _ancestral(t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(below, keep, up): a stochastic step from t to s is a deterministic one to a time below s, and back up by noise:

        x_s = keep x_below + up z = (1 - s) x0 + down eps + up z,    down^2 + up^2 = s^2,    up = eta s sqrt(1 - q^2),

    with q the ratio of sigma / alpha at s and t, that is e^-h (Song et al. 2021a, eq. 16, in r = t / (1 - t)).
    """
    moved = torch.where(s < t, (t - s) / (t * (1 - s)), 0.0)  # 1 - q, without cancellation
    up = eta * s * (moved * (2 - moved)).sqrt()
    down = s * (1 - eta**2 + eta**2 * (1 - moved) ** 2).sqrt()
    keep = 1 - s + down
    return down / keep, keep, up


def ddim(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2021a, eq. 12): eta = 0 is Euler's method, eta = 1 ancestral sampling. ValueError for eta outside [0, 1]."""
    within(0, 1, eta=eta)
    x, times = _begin(x, times)
    ts, ss = times[:-1], times[1:]
    below, keeps, ups = _ancestral(ts, ss, eta)
    draws = _acts(ups)
    for i, (t, s, dt, keep, up) in enumerate(_steps(x, times, below - ts, keeps, ups)):
        v = denoise(x, t)
        start, x = x, _plus(x, dt, v)
        if draws[i]:
            x = _noised(x, keep, up, generator)
        yield Step(s, x, start, t, v)


def ddpm(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, eq. 7): DDIM with eta = 1. Order 1 in distribution."""
    return ddim(denoise, x, times, generator=generator, eta=1.0)


def _extrapolation(ts: Tensor, ss: Tensor) -> tuple[Tensor, Tensor]:
    """(h, k): the steps in lambda = log((1 - t) / t), and h / (2 h_previous), 0 where either is infinite or nothing moves."""
    h = log_snr(ss) - log_snr(ts)
    k = torch.zeros_like(h)
    k[1:] = h[1:] / (2 * h[:-1])
    return h, torch.where(k.isfinite() & h.isfinite(), k, 0.0)


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """DPM-Solver++(2M), order 2, one network call a step (Lu et al. 2022b, algorithm 2).

    With lambda = log((1 - t) / t), which is -inf at pure noise and +inf at data: the first step out of t = 1 and the last
    one into t = 0 have no finite step in lambda and are of first order.
    """
    return _multistep(denoise, x, times, generator, eta=0.0)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` with the noise of `ddpm` (Lu et al. 2022b, section 5)."""
    return _multistep(denoise, x, times, generator, eta=1.0)


def _multistep(denoise: Denoise, x: Tensor, times: Tensor, generator: Generators, eta: float) -> Iterator[Step]:
    """The exponential step (s / t) x - (1 - s) (e^-h - 1) D is the straight line from x at t towards data D, at s."""
    x, times = _begin(x, times)
    ts, ss = times[:-1], times[1:]
    below, keeps, ups = _ancestral(ts, ss, eta)
    ratios, (_, k) = torch.where(ts > 0, below / ts, 1.0), _extrapolation(ts, ss)
    draws, previous = _acts(ups), None
    for i, (t, s, minus_t, ratio, ahead, keep, up) in enumerate(_steps(x, times, -ts, ratios, 1 + k, keeps, ups)):
        v = denoise(x, t)
        x0 = _plus(x, minus_t, v)
        data = x0 if previous is None else previous.lerp_(x0, ahead)
        start, x, previous = x, torch.lerp(data, x, ratio), x0
        if draws[i]:
            x = _noised(x, keep, up, generator)
        yield Step(s, x, start, t, v)


def unipc(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """UniPC-2, B(h) = e^h - 1, order 3, one network call a step (Zhao et al. 2023, algorithms 5 and 7, data prediction).

    The predictor is DPM-Solver++(2M). The call that it makes at s then corrects the step that led there: the same
    exponential step, with the data along it extrapolated through the new estimate too. Steps of infinite h are not corrected.
    """
    x, times = _begin(x, times)
    ts, ss = times[:-1], times[1:]
    h, k = _extrapolation(ts, ss)
    ratios = torch.where(ts > 0, ss / ts, 1.0)
    # Row i corrects the step that led to ts[i].
    a, b, back = (torch.cat([torch.zeros_like(c[:1]), c[:-1]]) for c in (*_correction(h, k), ratios))
    corrects, origin, last, change = _acts(b), x, x, x
    for i, (t, s, minus_t, ratio, k_i, a_i, b_i, back_i) in enumerate(_steps(x, times, -ts, ratios, k, a, b, back)):
        v = denoise(x, t)
        start, x0 = x, _plus(x, minus_t, v)
        if corrects[i]:
            x = _plus(torch.lerp(last, x0, b_i), a_i, change).lerp_(origin, back_i)
        origin, last, change = x, x0, x0 - last
        x = _plus(x0, k_i, change).lerp_(x, ratio)
        yield Step(s, x, start, t, v)


def _correction(h: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (a, b) of data_t - data_previous and data_s - data_t in UniPC's corrector of a step h from t to s.

    They solve R rho = b of Zhao et al. 2023, eq. 10 for r = (-h_previous / h, 1); without a previous step, b = 1/2 and a = 0.
    """
    phi = torch.expm1(-h)
    first = (phi / -h - 1) / phi
    second = 2 * ((phi / -h - 1) / -h - 0.5) / phi
    r = -1 / (2 * k)
    old = (first - second) / (1 - r)
    moves = h.isfinite() & (h > 0)
    a, b = torch.where(k > 0, -old / r, 0.0), torch.where(k > 0, first - old, 0.5)
    return torch.where(moves, a, 0.0), torch.where(moves, b, 0.0)


# (t, s) -> (a, b, std), all of t's shape: the Gaussian step x_s = a x + b v + std z from t to s.
Law = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def maruyama(g2: Callable[[Tensor, Tensor], Tensor]) -> Law:
    """The Euler-Maruyama step of the flow's SDE with any diffusion g^2(t, s), which keeps the marginals as steps get small:

        a = 1 + g^2 dt / 2t,    b = (1 + g^2 (1 - t) / 2t) dt,    std = g sqrt(-dt),    dt = s - t

    The step into s = 0 is Euler's, without noise: it would stay in the sample.
    """

    def law(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, variance = s - t, torch.where((s > 0) & (s < t), g2(t, s), 0.0)
        half = torch.where(t > 0, variance / (2 * t), 0.0)
        return 1 + half * dt, (1 + half * (1 - t)) * dt, (variance * -dt).sqrt()

    return law


def grpo(level: float = 0.7) -> Law:
    """g = level sqrt(t / (1 - t)), with 1 - s for 1 - t at t = 1 (Liu et al. 2025, Flow-GRPO, eq. 9). level = sqrt(2) reverses
    the linear path's own SDE, level = 0 is Euler's method.
    """
    within(0, math.inf, level=level)
    return maruyama(lambda t, s: level**2 * t / (1 - torch.where(t == 1, s, t)))


def sit(norm: float = 1.0) -> Law:
    """g^2 = 2 norm t (Ma et al. 2024, SiT, "sigma"; REPA samples with it)."""
    within(0, math.inf, norm=norm)
    return maruyama(lambda t, s: 2 * norm * t)


def constant(g: float = 0.3) -> Law:
    """The same g at all times (Xue et al. 2025, DanceGRPO)."""
    within(0, math.inf, g=g)
    return maruyama(lambda t, s: torch.full_like(t, g**2))


def cps(level: float = 0.8) -> Law:
    """Coefficients-preserving sampling (Wang & Yu 2025): x_s = (1 - s) x0 + s cos(pi level / 2) eps + s sin(pi level / 2) z.

    The noise does not shrink with the step, so that the marginals are not the flow's: for exploration alone. level within [0, 1].
    """
    within(0, 1, level=level)
    cosine, sine = math.cos(math.pi / 2 * level), math.sin(math.pi / 2 * level)

    def law(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moves = s < t
        down = torch.where(moves, cosine * s, s)
        return 1 - s + down, down * (1 - t) - (1 - s) * t, torch.where(moves, sine * s, 0.0)

    return law


def flow_sde(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None, law: Law | None = None) -> Iterator[Step]:
    """Stochastic steps by a `Law`, `grpo()` unless another is given; `transition`, `log_prob` and `kl` give their densities."""
    x, times = _begin(x, times)
    ts, ss = times[:-1], times[1:]
    coefficients = (law or grpo())(ts, ss)
    draws = _acts(coefficients[-1])
    for i, (t, s, a, b, std) in enumerate(_steps(x, times, *coefficients)):
        v = denoise(x, t)
        start, x = x, _plus(a * x, b, v)
        if draws[i]:
            x = _plus(x, std, randn_like(x, generator))
        yield Step(s, x, start, t, v)


def transition(x: Tensor, v: Tensor, t: Tensor, s: Tensor, law: Law | None = None) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and standard deviation, of t's shape, of the step from x at t to s < t by a `Law`, `grpo()` unless another is given.

    In float32 or better, and differentiable in v. The deviation is 0 at s = 0.
    """
    within(0, 1, t=t, s=s)
    a, b, std = (law or grpo())(t, s)
    return like(a, x) * x + like(b, x) * v, std


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) log-density of a step that ended at x, the mean over elements, as Flow-GRPO's clipping expects. ValueError where std is 0."""
    above(0, std=std)
    std = like(std, x)
    density = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """(B,) Kullback-Leibler divergence between two steps of one std, the mean over elements. ValueError where std is 0."""
    above(0, std=std)
    return ((mean - reference) ** 2 / (2 * like(std, mean) ** 2)).flatten(1).mean(1)


def consistency(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to data, add fresh noise, jump again.

    For networks whose x - t v is already the end of the path. Stochastic from the second step on. With any other network it takes a
    mean for a sample at every step, so that it narrows the distribution at any number of steps, and forgets its earlier errors.
    """
    x, times = _begin(x, times)
    ts, ss = times[:-1], times[1:]
    draws = _acts(ss)
    for i, (t, s, minus_t, share) in enumerate(_steps(x, times, -ts, ss)):
        v = denoise(x, t)
        start, x = x, _plus(x, minus_t, v)
        if draws[i]:
            x = x.lerp_(randn_like(x, generator), share)
        yield Step(s, x, start, t, v)


def invert(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None, iterations: int = 5) -> Iterator[Step]:
    """The inverse of `euler` on the same times turned round: from data at 0 up to the noise that it came from.

    Solves x_t = x_s + (t - s) v(x_t, t) by fixed-point iteration from x_s (Pan et al. 2023, AIDI, eq. 8), so many network calls a
    step. Converges where (t - s) |dv/dx| < 1. ValueError for iterations < 1.
    """
    within(1, math.inf, iterations=iterations)
    x, times = _begin(x, times, up=True, down=False)
    for s, t, dt in _steps(x, times, times.diff(dim=0)):
        start = x
        for _ in range(iterations):
            v = denoise(x, t)
            x = _plus(start, dt, v)
        yield Step(t, x, start, s, v)


def log_likelihood(denoise: Denoise, x: Tensor, times: Tensor, *, generator: Generators = None) -> Tensor:
    """(B,) log-density of data x under the flow, in nats (Song et al. 2021b, eq. 39): Heun's method over rising times (N + 1,).

        log p(x) = log N(x_1) + integral over t of div v, with div v ~ probe . (dv/dx) probe

    for one vector of signs per sample and trajectory (Hutchinson); unbiased, exact where dv/dx is a multiple of the identity.
    """
    x, times = _begin(x, times, up=True, down=False)
    probe = torch.where(randn_like(x, generator) < 0, -torch.ones_like(x), torch.ones_like(x))

    def with_divergence(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = denoise(x, t)
            (pulled,) = torch.autograd.grad((v * probe).sum(), x)
        return v.detach(), (pulled * probe).flatten(1).sum(1)

    total = x.new_zeros(len(x))
    for t, s, dt in _steps(x, times, times.diff(dim=0)):
        v, divergence = with_divergence(x, t)
        v_s, divergence_s = with_divergence(_plus(x, dt, v), s)
        x = _plus(x, dt / 2, v + v_s)
        total = total + (s - t) * (divergence + divergence_s) / 2
    return total - (x**2 + math.log(2 * math.pi)).flatten(1).sum(1) / 2


def straightness(denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
    """(B,) how far paths from noise x are from straight (Liu et al. 2022, section 2.2), over falling times (N + 1,) by Euler's method:

        S = integral over t of |(x_1 - x_0) - v(x_t, t)|^2,    the mean over elements

    Zero where one Euler step is as good as many.
    """
    steps = list(euler(denoise, x, times))
    start, length = steps[0].start, float(times[0] - times[-1])
    whole = (start - steps[-1].x) / length
    bends = torch.stack([(whole - step.v).square().flatten(1).mean(1) for step in steps])  # (N, B)
    return (-times.diff()).to(x) @ bends / length


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
