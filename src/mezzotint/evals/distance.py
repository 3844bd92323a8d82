"""Where it fits: how far a set of pictures is from another, and how much the pictures of one prompt differ.

In: `frechet` (the formula of FID) and `kernel` (of KID) over features of any origin, and `diversity` over pictures.
Out: the features (`evals.features`), and the choice of the sets.
Gotchas: name a result after the features it was measured in: only Inception-V3 features make an FID or a KID.
"""

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mezzotint.evals.features import CELLS, scattering

BLACK_TO_WHITE = 2 * math.sqrt(3) * CELLS  # the distance of these two flat pictures in scattering features


def frechet(a: Tensor, b: Tensor) -> float:
    """The squared Frechet distance of the Gaussians fitted to two sets of features, the formula of FID.

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6:
    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with unbiased covariances, all in float64.

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2). With S = R^T R from a QR
    factorisation of the centred features these roots are the singular values of R_a R_b^T. We take them there: none is
    negative or complex, nothing is squared and rooted again, and fewer samples than dimensions are no special case.

    Few samples bias the distance upwards: compare only numbers measured with the same N and M.

    Args: a (N, D), b (M, D), of any floating type. Returns: >= 0.
    Raises: ValueError for fewer than two samples, different D, or a non-finite feature.
    """
    a, b = _pair(a, b)
    root_a, root_b = _root_of_covariance(a), _root_of_covariance(b)
    means = (a.mean(0) - b.mean(0)).square().sum()
    traces = root_a.square().sum() + root_b.square().sum()
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, float(means + traces - 2 * overlap))  # equal sets may come out at -1e-15


def _root_of_covariance(x: Tensor) -> Tensor:
    """R with R^T R the unbiased covariance of the rows of x (N, D). Returns (min(N, D), D)."""
    return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R


def kernel(a: Tensor, b: Tensor) -> float:
    """The squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, the formula of KID.

    Binkowski et al. 2018, "Demystifying MMD GANs", section 4, with the unbiased estimate of Gretton et al. 2012, equation 3.
    We differ: one estimate over all samples, where the paper averages over random subsets of them. That has the same
    expectation and less variance, and needs no seed; memory is N x M. It may be negative; its mean over draws is not.

    Args: a (N, D), b (M, D), of any floating type; computed in float64.
    Raises: ValueError for fewer than two samples, different D, or a non-finite feature.
    """
    a, b = _pair(a, b)
    return float(_mean_off_diagonal(_cubic(a, a)) + _mean_off_diagonal(_cubic(b, b)) - 2 * _cubic(a, b).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.trace()) / (n * (n - 1))


def diversity(images: Tensor, groups: Sequence[Hashable]) -> float:
    """How much pictures of one group (of one prompt, drawn with different seeds) differ, averaged over the groups.

    The mean over all pairs of a group of the distance of their scattering features, as a share of the distance between a
    black and a white picture. The scale is fixed, so values of different models and runs compare: 0 for copies, about 0.35
    for unrelated procedural scenes; above 1 is only noise of full contrast.

    Args: images (B, 3, H, W) in [-1, 1]; groups, B names, e.g. the prompts; equal names need not be neighbours.
    Raises: ValueError for a group with a single picture, another number of groups than of images, or a non-finite image.
    """
    if len(groups) != len(images):
        raise ValueError(f"groups must name a group for each of {len(images)} images, got {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    features = scattering(images).cpu()
    spreads = [torch.pdist(_checked(f"images of group {group!r}", features[rows])).mean() for group, rows in members.items()]
    if not spreads:
        raise ValueError("images must hold at least 2 samples, got 0")
    return float(torch.stack(spreads).mean()) / BLACK_TO_WHITE


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _checked("a", a), _checked("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of features, got {a.shape[1]} and {b.shape[1]}")
    return a, b


def _checked(name: str, features: Tensor) -> Tensor:
    """Features (N, D) in float64 on the CPU, once they are known to be at least two and finite."""
    if features.ndim != 2:
        raise ValueError(f"{name} must be of shape (samples, features), got {tuple(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"{name} must hold at least 2 samples, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite; sample {int(features.isfinite().all(1).logical_not().nonzero()[0])} is not")
    return features.to("cpu", torch.float64)
