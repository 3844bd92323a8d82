"""Why diffusion draws the coarse before the fine: power spectra, and when noise drowns them.

White noise is equally strong at all frequencies, pictures are strong at low ones and weak at high ones (their power falls about as the
inverse square of frequency: van der Schaaf & van Hateren 1996). So on the way from data to noise the finest detail drowns first, and on
the way back it comes last (Rissanen et al. 2023, section 2; Dieleman 2024).
"""

import math

import torch
from torch import Tensor

from mezzotint.flow.domain import within


def radial_power(x: Tensor) -> Tensor:
    """Power at each spatial frequency, averaged over directions: (..., H, W) -> (..., K) with K = min(H, W) // 2 + 1.

    Entry k is of waves with k - 1/2 to k + 1/2 periods along the shorter side, K - 1 the finest that all directions have. White noise of
    unit variance has power 1 at every frequency. No window is laid over x: what its borders break counts as detail.
    ValueError for x without height and width.
    """
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x must have a height and a width above 0, got shape {tuple(x.shape)}")
    height, width = x.shape[-2:]
    frequencies = [torch.fft.fftfreq(side, device=x.device) * min(height, width) for side in (height, width)]
    ring = torch.hypot(frequencies[0][:, None], frequencies[1]).round().long()
    count = min(height, width) // 2 + 1
    inside = ring < count
    power = torch.fft.fft2(x if x.dtype == torch.float64 else x.float(), norm="ortho").abs().square()[..., inside]
    total = power.new_zeros(*x.shape[:-2], count).index_add_(-1, ring[inside], power)
    return total / ring[inside].bincount()


def drowning_time(power: Tensor) -> Tensor:
    """The time at which noise is as strong as data of some power: (1 - t)^2 power = t^2. Of power's shape; 0 where there is none.

    ValueError for negative power.
    """
    within(0, math.inf, power=power)
    return 1 / (1 + power**-0.5)
