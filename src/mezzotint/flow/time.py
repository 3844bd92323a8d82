"""Which times a model is trained at and sampled at, and how much each counts.

A density is written as its inverse distribution function, so that stratified uniform numbers stay stratified. A weight is of the
velocity's squared error on the linear path; those of data and noise are t and 1 - t times the velocity's, so that a weight of either
squared error becomes ours by t^2 or (1 - t)^2. Only density times weight matters in expectation: use one of them, not both.

u and t are within [0, 1], of any shape; ValueError outside.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.flow.domain import above, within


def stratified(number: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """(number,) uniform numbers in (0, 1), one in each of `number` equal strata, in random order.

    A batch then covers all times evenly, which takes most of the variance out of its loss (Kingma et al. 2021, 4.1). With several
    ranks all of them together hold one number in each of number * ranks strata, and none needs to hear of the others.
    Draws from torch's global generator. ValueError for number < 1 or a rank that is none of `ranks`.
    """
    within(1, math.inf, number=number, ranks=ranks)
    within(0, ranks - 1, rank=rank)
    return (torch.randperm(number) * ranks + rank + torch.rand(number)).div(number * ranks).clamp(1e-6, 1 - 1e-6)


def places(number: int, steps: int) -> Tensor:
    """(number,) steps of a grid of so many, each about equally often and, for any number, equally likely; in random order."""
    return (stratified(number) * steps).long()


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times with normal logits (Esser et al. 2024, eq. 19): most of them mid-way. mean > 0 means more noise."""
    within(0, 1, u=u)
    above(0, std=std)
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """Times heavy in the middle for scale > 0, at the ends for scale < 0 (Esser et al. 2024, eq. 20); 0 is uniform.

    ValueError for scale outside [-1, 2 / (pi - 2)], where times would turn back. Falls from 1 to 0 as u rises.
    """
    within(0, 1, u=u)
    within(-1, 2 / (math.pi - 2), scale=scale)
    return (1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)).clamp(0, 1)


def cosmap(u: Tensor) -> Tensor:
    """Times whose logarithmic signal-to-noise ratio is distributed as the cosine schedule's (Esser et al. 2024, section 3.1).

    1 - 1 / (tan(pi u / 2) + 1), as a quotient that is right at both ends.
    """
    within(0, 1, u=u)
    sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u).clamp_min(0)
    return sine / (sine + cosine)


def edm_log_normal(u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Times whose sigma = t / (1 - t) is log-normal (Karras et al. 2022, table 1). log sigma is the logit of t: `logit_normal`."""
    return logit_normal(u, mean, std)


def shift(t: Tensor, ratio: float) -> Tensor:
    """Move times towards noise: the signal-to-noise ratio falls by ratio^2 (Esser et al. 2024, eq. 23).

    For pictures with n times the pixels use sqrt(n). Shifting by a and then by 1/a is the identity; 0 and 1 stay, to the last bit.
    """
    within(0, 1, t=t)
    above(0, ratio=ratio)
    return torch.where(t < 1, (ratio * t / (1 + (ratio - 1) * t)).clamp_max(1), t)


def sd3_ratio(size: int, reference: int) -> float:
    """The ratio of `shift` for pictures of `size` pixels or tokens by a model at home at `reference` (Esser et al. 2024, eq. 23)."""
    within(1, math.inf, size=size, reference=reference)
    return math.sqrt(size / reference)


def flux_ratio(tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """The ratio of `shift` as FLUX has it: exp(mu), mu linear in the number of tokens through two points (tokens, mu).

    LTX-Video has the points (1024, 0.95) and (4096, 2.05), and a `stretched` grid. ValueError where low has not fewer tokens than high.
    """
    within(1, math.inf, tokens=tokens)
    above(low[0], high=high[0])
    return math.exp(low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0]))


def stretched(times: Tensor, last: float = 0.1) -> Tensor:
    """A falling grid with its last time above 0 moved to `last`, and 1 kept (LTX-Video): 1 - t is scaled. A final 0 stays.

    A grid of noise alone, (1, 0), has nothing to move. ValueError for times that do not fall, and for last outside (0, 1).
    """
    within(0, 1, times=times)
    if not 0 < last < 1:
        raise ValueError(f"last must be within (0, 1), got {last}")
    if times.ndim != 1 or not bool((times.diff() < 0).all()):
        raise ValueError("times must be one falling grid")
    inner = times[(times > 0) & (times < 1)]
    return torch.where(times > 0, 1 - (1 - times) * (1 - last) / (1 - inner[-1]), times) if len(inner) else times


def min_snr(t: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight min(SNR, gamma) of the data's error (Hang et al. 2023, eq. 8), on the velocity's: min((1 - t)^2, gamma t^2)."""
    within(0, 1, t=t)
    above(0, gamma=gamma)
    return torch.minimum((1 - t) ** 2, gamma * t**2)


def truncated_snr(t: Tensor) -> Tensor:
    """Weight max(SNR, 1) of the data's error (Salimans & Ho 2022, section 4), on the velocity's: max((1 - t)^2, t^2)."""
    within(0, 1, t=t)
    return torch.maximum(1 - t, t) ** 2


def edm_weight(t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 of the data's error (Karras et al. 2022, table 1), on the velocity's."""
    within(0, 1, t=t)
    above(0, sigma_data=sigma_data)
    return (t / sigma_data) ** 2 + (1 - t) ** 2


def sigma_sqrt(t: Tensor, smallest: float = 1e-3) -> Tensor:
    """Weight 1 / t^2 on the velocity's error, as SD3's trainers call it: that of the noise-free end; t is kept at least `smallest`."""
    within(0, 1, t=t)
    above(0, smallest=smallest)
    return t.clamp_min(smallest) ** -2


def cosmap_weight(t: Tensor) -> Tensor:
    """The density of `cosmap` as a weight: 2 / (pi (1 - 2 t + 2 t^2)) (Esser et al. 2024, section 3.1)."""
    within(0, 1, t=t)
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


@dataclass
class TimeDensity:
    """The density of training times: logit-normal, mixed with a share of uniform ones, then shifted.

    mean, std: of the logit. uniform: share of the batch drawn uniformly, since the logit-normal density vanishes at both
    ends. ratio: see `shift`.
    """

    mean: float = 0.0
    std: float = 1.0
    uniform: float = 0.0
    ratio: float = 1.0

    def sample(self, number: int) -> Tensor:
        """(number,) times, stratified. Draws from torch's global generator."""
        within(0, 1, uniform=self.uniform)
        u = stratified(number)
        t = torch.where(torch.rand(number) < self.uniform, u, logit_normal(u, self.mean, self.std))
        return shift(t, self.ratio)


def grid(steps: int, ratio: float = 1.0) -> Tensor:
    """(steps + 1,) times of a sampler on the CPU, from 1 down to 0, evenly spaced before the shift. Raises ValueError for steps < 1."""
    within(1, math.inf, steps=steps)
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu"), ratio).float()
