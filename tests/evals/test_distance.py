"""Distances against closed forms, and the scattering features against what a distance between pictures should see."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.evals.distance import diversity, frechet, kernel
from mezzotint.evals.features import DIMENSION, scattering


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count: int, dimension: int, seed: int = 0) -> Tensor:
    """Samples whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = normal(count, dimension, seed=seed)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * math.sqrt(count - 1)


def blobs(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Soft coloured discs on coloured grounds, (count, 3, size, size): one disc per picture, at a random place."""
    generator = torch.Generator().manual_seed(seed)
    middle, colour, ground = (torch.rand(count, n, generator=generator) for n in (2, 3, 3))
    radius = 0.15 + 0.15 * torch.rand(count, generator=generator)
    return discs(middle, radius, colour * 2 - 1, ground * 2 - 1, size)


def discs(middle: Tensor, radius: Tensor, colour: Tensor, ground: Tensor, size: int = 32) -> Tensor:
    axis = (torch.arange(size) + 0.5) / size
    distance = torch.hypot(axis[None, None, :] - middle[:, 0, None, None], axis[None, :, None] - middle[:, 1, None, None])
    cover = torch.sigmoid((radius[:, None, None] - distance) * 40)[:, None]
    return torch.lerp(ground[:, :, None, None], colour[:, :, None, None], cover)


def one_disc(size: int = 32) -> Tensor:
    return discs(
        torch.tensor([[0.45, 0.55]]), torch.tensor([0.25]), torch.tensor([[0.8, -0.6, -0.6]]), torch.tensor([[-0.2, 0.0, 0.3]]), size
    )


def blurred(images: Tensor, passes: int) -> Tensor:
    for _ in range(passes):
        images = F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, stride=1)
    return images


def moved(before: Tensor, after: Tensor) -> float:
    return float((scattering(after) - scattering(before)).norm())


def test_frechet_of_a_shift_is_its_squared_length() -> None:
    a, shift = normal(200, 12), torch.linspace(-1, 2, 12, dtype=torch.float64)
    assert frechet(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-10)


def test_frechet_of_scaled_covariances() -> None:
    a = whitened(300, 8)
    scales = torch.linspace(0.5, 3, 8, dtype=torch.float64)
    assert frechet(a, a * scales) == pytest.approx(float((scales - 1).square().sum()), rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    """For S_a = I the distance is sum (1 - sqrt(eigenvalue of S_b))^2, whatever the eigenvectors."""
    a, mix = whitened(300, 6), normal(6, 6, seed=1)
    b = whitened(300, 6, seed=2) @ mix
    eigenvalues = torch.linalg.eigvalsh(mix.T @ mix)
    assert frechet(a, b) == pytest.approx(float((1 - eigenvalues.sqrt()).square().sum()), rel=1e-10)


def test_frechet_agrees_with_the_root_of_the_product() -> None:
    """The textbook form: the trace of the root of S_a S_b through its eigenvalues."""
    a, b = normal(100, 7) @ normal(7, 7, seed=1), normal(90, 7, seed=2) + 0.3
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(s_a @ s_b).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("count", [300, 20])
def test_frechet_is_zero_for_the_same_set_and_symmetric(count: int) -> None:
    """Also with fewer samples than the 64 dimensions."""
    a, b = normal(count, 64), 1.5 * normal(count + 10, 64, seed=1) + 0.1
    assert frechet(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-10)
    assert frechet(a, b) > 1


def test_frechet_is_biased_upwards_and_less_with_more_samples() -> None:
    distances = [frechet(normal(n, 16, seed=n), normal(n, 16, seed=n + 1)) for n in (30, 100, 1000)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] > 0


def test_kernel_by_hand() -> None:
    """D = 1: (1*2+1)^3 = 27 within a, (0*-1+1)^3 = 1 within b; across 1, 0, 1, -1, whose mean is 1/4."""
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [-1.0]])
    assert kernel(a, b) == pytest.approx(27 + 1 - 2 * 0.25)
    assert kernel(b, a) == pytest.approx(kernel(a, b))


def test_kernel_is_unbiased_about_zero() -> None:
    """40 pairs of draws from one distribution: the mean is within three standard errors of 0, and signs are mixed."""
    values = torch.tensor([kernel(normal(60, 8, seed=2 * i), normal(40, 8, seed=2 * i + 1)) for i in range(40)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert values.min() < 0 < values.max()
    assert kernel(normal(60, 8), normal(40, 8, seed=1) + 0.5) > values.max()


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_distances_grow_with_damage(damage: str) -> None:
    """The same pictures before and after, so that only the damage is measured."""
    pictures = blobs(32)
    noise = 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))
    ladder = [(pictures + level * noise).clamp(-1, 1) if damage == "noise" else blurred(pictures, 2 * level**2) for level in range(4)]
    features = [scattering(step) for step in ladder]
    for distance in (frechet, kernel):
        distances = [distance(features[0], step) for step in features]
        assert all(more > less for less, more in pairwise(distances)), distance


@pytest.mark.parametrize("distance", [frechet, kernel])
def test_unusable_features_are_named(distance: Callable[[Tensor, Tensor], float]) -> None:
    good, bad = normal(5, 3), normal(5, 3)
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match="a must hold at least 2 samples, got 1"):
        distance(good[:1], good)
    with pytest.raises(ValueError, match="b must hold at least 2 samples, got 0"):
        distance(good, good[:0])
    with pytest.raises(ValueError, match="same number of features, got 3 and 2"):
        distance(good, good[:, :2])
    with pytest.raises(ValueError, match="b must be finite; sample 3 is not"):
        distance(good, bad)
    with pytest.raises(ValueError, match="a must be of shape"):
        distance(good[0], good)


def test_features_are_fixed_numbers_of_their_own_picture() -> None:
    images = blobs(20)
    features = scattering(images)
    assert features.shape == (20, DIMENSION)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    torch.testing.assert_close(features[17:18], scattering(images[17:18]))
    torch.testing.assert_close(features, scattering(images.double()))
    assert scattering(images[:0]).shape == (0, DIMENSION)


def test_flat_pictures_have_only_their_colour() -> None:
    features = scattering(torch.full((1, 3, 20, 50), 0.5))
    torch.testing.assert_close(features[0, :16], torch.full((16,), 0.5 * math.sqrt(3)))
    assert features[0, 16:].abs().max() < 1e-4


@pytest.mark.parametrize("size", [64, 100])
def test_features_of_sizes_compare(size: int) -> None:
    """The same picture, drawn larger, is much nearer than one whose disc is elsewhere."""
    small, large = blobs(8), blobs(8, size)
    apart = (scattering(small) - scattering(large)).norm(dim=1)
    assert (apart < 0.05 * (scattering(small) - scattering(small.roll(1, 0))).norm(dim=1)).all()
    assert scattering(F.interpolate(large, (48, 96))).shape == (8, DIMENSION)


def test_colour_and_shape_move_features_more_than_a_shift() -> None:
    disc = one_disc()
    square = torch.where((disc[:, :1] > 0.3), disc[:, :, 17:18, 14:15], disc[:, :, :1, :1]).expand_as(disc).clone()
    square[:, :, 9:25, 6:22] = disc[:, :, 17:18, 14:15]
    shift = moved(disc, disc.roll(1, 3))
    assert shift < 0.1 * float(scattering(disc).norm())
    assert moved(disc, disc[:, [1, 2, 0]]) > 3 * shift
    assert moved(disc, square) > 2 * shift


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_features_of_something_else_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="images must be"):
        scattering(images)


def test_diversity_of_copies_is_zero_and_of_black_and_white_one() -> None:
    copies = one_disc().expand(6, -1, -1, -1)
    assert diversity(copies, ["a", "b", "a", "b", "b", "a"]) == pytest.approx(0, abs=1e-6)
    extremes = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 32, 32)
    assert diversity(extremes, [0, 0]) == pytest.approx(1, abs=1e-5)


def test_diversity_looks_within_groups_only() -> None:
    """Two prompts, each with one picture for all seeds, are not diverse; half varied is half as diverse as varied."""
    varied = blobs(4)
    collapsed = varied[[0, 0, 1, 1]]
    assert diversity(collapsed, ["a", "a", "b", "b"]) == pytest.approx(0, abs=1e-6)
    assert 0.05 < diversity(varied, ["a", "a", "b", "b"]) < 1
    half = diversity(varied[[0, 1, 2, 2]], ["a", "a", "b", "b"])
    assert half == pytest.approx(diversity(varied[:2], ["a", "a"]) / 2, rel=1e-5)


def test_diversity_refuses_what_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="group 'b' must hold at least 2 samples, got 1"):
        diversity(blobs(3), ["a", "a", "b"])
    with pytest.raises(ValueError, match="each of 3 images, got 2"):
        diversity(blobs(3), ["a", "a"])
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        diversity(blobs(0), [])
    with pytest.raises(ValueError, match="group 'a' must be finite"):
        diversity(torch.full((2, 3, 8, 8), math.nan), ["a", "a"])
