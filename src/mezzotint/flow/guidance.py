"""Guidance: functions that turn denoise functions into a denoise function.

A rule makes one velocity of two, rule(x, t, v_c, v_u). `guided` calls the two branches and a rule; `linear`, `apg` and `cfg_zero_star`
are rules; `rescaled`, `renormed` and `skip_layer` wrap a rule. What the second branch is names the technique: the null condition
(classifier-free guidance), another prompt (a negative prompt), a weaker model with the same condition (auto-guidance, Karras et al.
2024). `sequential` calls the branches one after the other, `batched` in one call of twice the batch; the results are equal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mezzotint.flow.domain import above, within
from mezzotint.flow.path import T_MIN, like
from mezzotint.flow.solvers import Denoise

Branches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ALWAYS = (0.0, 1.0)


def sequential(conditional: Denoise, other: Denoise) -> Branches:
    """Both branches in two calls: half the memory of `batched`, and the only way where they are two networks."""
    return lambda x, t: (conditional(x, t), other(x, t))


def batched(pair: Denoise) -> Branches:
    """Both branches in one call of pair(x, t), whose batch is twice ours: conditional rows first."""

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        v_c, v_u = pair(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return v_c, v_u

    return both


def guided(conditional: Denoise, both: Branches, rule: Rule, interval: tuple[float, float] = ALWAYS) -> Denoise:
    """A rule applied at times inside `interval`; outside it only the conditional branch is called (Kynkaanniemi et al. 2024).

    Each item of a batch goes by its own time.
    """
    _check_interval(interval)

    def always(x: Tensor, t: Tensor) -> Tensor:
        return rule(x, t, *both(x, t))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        inside = _inside(t, interval)
        if not inside.any():
            return conditional(x, t)
        v_c, v_u = both(x, t)
        v = rule(x, t, v_c, v_u)
        return v if inside.all() else torch.where(like(inside, x), v, v_c)

    return always if interval == ALWAYS else denoise  # which does not wait for the device to know


def _check_interval(interval: tuple[float, float]) -> None:
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval must be two times that rise within [0, 1], got {interval}")


def _inside(t: Tensor, interval: tuple[float, float]) -> Tensor:
    return (t >= interval[0]) & (t <= interval[1])


def linear(scale: float) -> Rule:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) in the scale where 1 is off: v = v_u + scale (v_c - v_u)."""
    return lambda x, t, v_c, v_u: v_u + scale * (v_c - v_u)


def cfg(conditional: Denoise, both: Branches, scale: float, interval: tuple[float, float] = ALWAYS) -> Denoise:
    """Classifier-free guidance by `linear`, limited to times inside `interval`. At scale 1 only the conditional branch is called.

    both(x, t) gives (v_c, v_u), in one batched network call or two; which of them must not change the result.
    """
    return conditional if scale == 1 else guided(conditional, both, linear(scale), interval)


def rescaled(rule: Rule, share: float = 0.7) -> Rule:
    """The rule's velocity with its spread over a sample brought back to the conditional's (Lin et al. 2024, eqs. 15 and 16).

    share: of the result, beside what the rule gave; the paper's phi. ValueError outside [0, 1]. A velocity without spread stays.
    """
    within(0, 1, share=share)

    def rescale(x: Tensor, t: Tensor, v_c: Tensor, v_u: Tensor) -> Tensor:
        v = rule(x, t, v_c, v_u)
        spread = v.flatten(1).std(1, correction=0)
        ratio = torch.where(spread > 0, v_c.flatten(1).std(1, correction=0) / spread, 1.0)
        return v * like(share * ratio + (1 - share), v)

    return rescale


def renormed(rule: Rule, limit: float = 1.0) -> Rule:
    """The rule's velocity with a norm of at most `limit` times the conditional's, each sample for itself (Qin et al. 2025).

    Diffusers' pipeline of Lumina 2 gives every row of the latents the norm of the conditional's row instead, larger or smaller.
    """
    above(0, limit=limit)

    def renorm(x: Tensor, t: Tensor, v_c: Tensor, v_u: Tensor) -> Tensor:
        v = rule(x, t, v_c, v_u)
        ratio = limit * v_c.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
        return v * like(torch.where(ratio < 1, ratio, 1.0), v)

    return renorm


def apg(scale: float, parallel: float = 0.0, radius: float = 2.5, momentum: float = -0.5) -> Rule:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): D = D_c + (scale - 1) (orthogonal + parallel * along).

    D = x - t v is the data; D_c - D_u is averaged with a negative momentum, cut to `radius` and split along and across D_c.
    Diffusers adds scale times the update to D_u instead, so that scale 1 is not the conditional there.
    The rule remembers its last update: make one for each generation, and use it with solvers that call the network in order.
    """
    above(0, radius=radius)
    average: Tensor | None = None

    def rule(x: Tensor, t: Tensor, v_c: Tensor, v_u: Tensor) -> Tensor:
        nonlocal average
        time = like(t, x)
        difference = time * (v_u - v_c)
        average = difference if average is None else difference + momentum * average
        data, update = (x - time * v_c).flatten(1).double(), average.flatten(1).double()
        norm = update.norm(dim=1, keepdim=True)
        update = update * torch.where(norm > radius, radius / norm, 1.0)
        along = (update * data).sum(1, keepdim=True) / (data**2).sum(1, keepdim=True).clamp_min(1e-30) * data
        change = (update - along + parallel * along).reshape(x.shape).to(x)
        return v_c - (scale - 1) * change / time.clamp_min(T_MIN)

    return rule


def cfg_zero_star(scale: float, still: float = 0.04) -> Rule:
    """CFG-Zero* (Fan et al. 2025, eqs. 8 and 9): v_u first scaled by s* = <v_c, v_u> / |v_u|^2 of each sample, then `linear`.

    Within `still` of pure noise the velocity is zero. The paper counts steps, ours is a time: the same on an even grid. Made for
    Euler's method: to a solver that remembers data a velocity of zero says that noise is data. ValueError for still outside [0, 1].
    """
    within(0, 1, still=still)

    def rule(x: Tensor, t: Tensor, v_c: Tensor, v_u: Tensor) -> Tensor:
        c, u = v_c.flatten(1), v_u.flatten(1)
        best = like((c * u).sum(1) / (u**2).sum(1).clamp_min(1e-8), x) * v_u
        return torch.where(like(t > 1 - still, x), 0.0, best + scale * (v_c - best))

    return rule


RULES: dict[str, Callable[[float], Rule]] = {
    "cfg": linear,
    "rescaled": lambda scale: rescaled(linear(scale)),
    "renormed": lambda scale: renormed(linear(scale)),
    "apg": apg,
    "cfg_zero_star": cfg_zero_star,
}
"""Rules that need two branches and a scale, by name, each with the settings of its paper. Make one for each generation."""


def skip_layer(rule: Rule, skipped: Denoise, scale: float, interval: tuple[float, float] = ALWAYS) -> Rule:
    """A rule plus scale (v_c - v_skip), with `skipped` the conditional branch without some layers (Stability AI, SD 3.5): one more
    call at times inside `interval`.
    """
    _check_interval(interval)

    def with_skip(x: Tensor, t: Tensor, v_c: Tensor, v_u: Tensor) -> Tensor:
        v, inside = rule(x, t, v_c, v_u), _inside(t, interval)
        if not inside.any():
            return v
        skip = scale * (v_c - skipped(x, t))
        return v + torch.where(like(inside, x), skip, 0.0)

    return with_skip


def dynamic_threshold(x0: Tensor, quantile: float = 0.995) -> Tensor:
    """Data of a pixel model cut at a quantile of its size and scaled back into [-1, 1], per sample (Saharia et al. 2022, 2.3).

    Not for latents, whose range is no box. ValueError for quantile outside [0, 1].
    """
    within(0, 1, quantile=quantile)
    edge = like(x0.flatten(1).abs().quantile(quantile, dim=1).clamp_min(1), x0)
    return torch.minimum(torch.maximum(x0, -edge), edge) / edge
