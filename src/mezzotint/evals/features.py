"""Where it fits: the space in which `evals.distance` compares sets of pictures when no pretrained network is at hand.

In: `scattering`, a fixed map from pictures to 228 numbers made of wavelets: no weights, no download, no training.
Out: distances (`evals.distance`), which take features of any origin.
Gotchas: a Frechet distance in this space is not an FID; publish it as "FD-" + `NAME`. Whoever changes a constant below changes
the space, and must change `NAME` with it.

Letters: B pictures, J scales, L orientations, N = `SIDE` + 2 `MARGIN` pixels.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "scatter2-32"
SIDE = 32  # pictures are compared at SIDE x SIDE pixels
SCALES = 3  # J
ORIENTATIONS = 4  # L, over half a turn: a real picture answers alike to opposite ones
CELLS = 4  # mean colours are kept on a grid of CELLS x CELLS
MARGIN = 2**SCALES  # reflected pixels around the picture, so that opposite edges do not meet
PAIRS = [(j1, j2) for j1 in range(SCALES) for j2 in range(j1 + 1, SCALES)]
DIMENSION = 3 * (CELLS**2 + SCALES * ORIENTATIONS + len(PAIRS) * ORIENTATIONS**2)

# What brings the two orders to about the variance of the mean colours over procedural scenes, whose raw variances are
# 300 and 1500 times smaller. Fixed: gains fitted to the set at hand would make two evaluations incomparable.
FIRST_GAIN = 16.0
SECOND_GAIN = 40.0

CHUNK = 16  # pictures at once: bounds memory at about 100 MB

# Red, green, blue -> luma, red-green, yellow-blue. Orthonormal: distances between colours are those of RGB.
OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[3.0], [2.0], [6.0]]).sqrt()


@torch.no_grad()
def scattering(images: Tensor) -> Tensor:
    """Features of pictures: a wavelet scattering transform of order 2 beside coarse mean colours.

    Bruna & Mallat 2013, "Invariant Scattering Convolution Networks", section 2: with wavelets psi of J = 3 scales and
    L = 4 orientations, the means of |x * psi_1| (how much edge of which scale and direction) and, for coarser psi_2, of
    ||x * psi_1| * psi_2| (how these edges are arranged: corners, curves, textures). We differ: the average is over the
    whole picture, so these parts do not see position; in place of the paper's low-passed picture stand the mean colours of
    a 4 x 4 grid, which do; the three channels are opponent colours; and each order has a fixed gain.

    A picture of any size and aspect is first resized to 32 x 32, bicubic and antialiased, so that features of different
    sizes compare: detail finer than 1/32 of the picture is not seen, nor is the aspect.

    Args: images, (B, 3, H, W), floating point in [-1, 1].
    Returns: (B, 228) float32 on the same device: 3 x 16 colours, 3 x J x L first-order and 3 x 3 x L x L second-order
    means. Nothing in it depends on the other pictures.
    Raises: ValueError for another shape or an integer type.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be floating point of shape (B, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}")
    if len(images) == 0:
        return torch.empty(0, DIMENSION, device=images.device)
    return torch.cat([_scattering(chunk.float()) for chunk in images.split(CHUNK)])


def _scattering(images: Tensor) -> Tensor:
    resized = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    x = torch.einsum("oc,bchw->bohw", OPPONENT.to(images.device), resized)
    psi = _wavelets(images.device)  # (J, L, N, N)
    colours = F.adaptive_avg_pool2d(x, CELLS)
    u1 = _modulus(F.pad(x, [MARGIN] * 4, mode="reflect")[:, :, None, None], psi)  # (B, 3, J, L, N, N)
    s1 = _mean(u1)  # (B, 3, J, L)
    s2 = torch.stack([_mean(_modulus(u1[:, :, j1, :, None], psi[j2])) for j1, j2 in PAIRS], 2)  # (B, 3, pairs, L, L)
    return torch.cat([colours.flatten(1), FIRST_GAIN * s1.flatten(1), SECOND_GAIN * s2.flatten(1)], 1)


def _modulus(x: Tensor, psi: Tensor) -> Tensor:
    """|x * psi|, a periodic convolution: x real (..., N, N), psi a response as `_wavelets` gives it; they broadcast."""
    # Both forms are for speed: on a CPU, fft2 of a real tensor and abs of a complex one are several times slower.
    filtered = torch.fft.ifft2(torch.fft.fft2(x.to(torch.complex64)) * psi)
    return (filtered.real.square() + filtered.imag.square()).sqrt()


def _mean(x: Tensor) -> Tensor:
    """The mean over the picture without its margin: (..., N, N) -> (...)."""
    return x[..., MARGIN:-MARGIN, MARGIN:-MARGIN].mean((-2, -1))


@lru_cache
def _wavelets(device: torch.device) -> Tensor:
    """Frequency responses (J, L, N, N) float32 of Morlet wavelets; real, as psi(-u) is the conjugate of psi(u).

    Section 2.1 of the paper, with round envelopes: scale j has a width of 0.8 * 2^j pixels and a frequency of 3/4 pi / 2^j.
    The highest gain is 1; then the whole bank adds no energy, and pictures are no farther apart behind it than before it.
    """
    side = SIDE + 2 * MARGIN
    axis = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)  # 0, 1, ..., -2, -1: pixels from the wavelet's centre
    y, x = axis[:, None], axis[None, :]
    responses = []
    for j in range(SCALES):
        envelope = torch.exp(-(x**2 + y**2) / (2 * (0.8 * 2**j) ** 2))
        for angle in torch.arange(ORIENTATIONS) * (math.pi / ORIENTATIONS):
            wave = torch.exp(1j * (0.75 * math.pi / 2**j) * (x * angle.cos() + y * angle.sin()))
            offset = (envelope * wave).sum() / envelope.sum()  # without it the wavelet would see flat colour
            response = torch.fft.fft2(envelope * (wave - offset)).real
            responses.append(response / response.abs().max())
    return torch.stack(responses).unflatten(0, (SCALES, ORIENTATIONS)).to(device, torch.float32)
