"""Which times a model is trained at and sampled at.

A density is written as its inverse distribution function, so that stratified uniform numbers stay stratified.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def stratified(number: int) -> Tensor:
    """(number,) uniform numbers in (0, 1), one in each of `number` equal strata, in random order.

    A batch then covers all times evenly, which takes most of the variance out of its loss (Kingma et al. 2021, 4.1).
    Draws from torch's global generator.
    """
    return (torch.randperm(number) + torch.rand(number)).div(number).clamp(1e-6, 1 - 1e-6)


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times with normal logits (Esser et al. 2024, eq. 19): most of them mid-way. mean > 0 means more noise."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def shift(t: Tensor, ratio: float) -> Tensor:
    """Move times towards noise: the signal-to-noise ratio falls by ratio^2 (Esser et al. 2024, eq. 23).

    For pictures with n times the pixels use sqrt(n). Shifting by a and then by 1/a is the identity; 0 and 1 stay.
    """
    return ratio * t / (1 + (ratio - 1) * t)


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
        u = stratified(number)
        t = torch.where(torch.rand(number) < self.uniform, u, logit_normal(u, self.mean, self.std))
        return shift(t, self.ratio)


def grid(steps: int, ratio: float = 1.0) -> Tensor:
    """(steps + 1,) times of a sampler, from 1 down to 0, evenly spaced before the shift. Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), ratio).float()
