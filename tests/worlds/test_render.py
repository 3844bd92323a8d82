"""Pictures of scenes: areas against closed forms, and independence of size and of neighbours."""

import math
import random

import pytest
import torch

from mezzotint.worlds.render import render
from mezzotint.worlds.scene import SHAPES, SIZES, STYLES, Scene, Thing
from mezzotint.worlds.splits import draw


def one(shape: str, size: str = "large", style: str = "flat", x: float = 0.5) -> Scene:
    return Scene((Thing(shape, "blue", size, x, 0.5),), "white", style, "left")


def area(shape: str, size: str) -> float:
    """The share of the picture that a thing covers, read from a channel that it makes dark (red, of a blue thing)."""
    empty = render([Scene((), "white", "flat", "left")], 256)
    shown = render([one(shape, size)], 256)
    return float(((empty - shown)[0, 0] / (empty[0, 0] + 1 - 2 * 0.12 * (empty[0, 0] + 1) / (2 * 0.97))).mean())


@pytest.mark.parametrize("size", SIZES)
def test_areas_are_those_of_geometry(size: str) -> None:
    radius = SIZES[size]
    assert area("circle", size) == pytest.approx(math.pi * radius**2, rel=0.01)
    assert area("square", size) == pytest.approx((2 * 0.86 * radius) ** 2, rel=0.01)
    assert area("ring", size) == pytest.approx(math.pi * radius**2 * (1 - 0.44**2), rel=0.01)
    assert area("triangle", size) == pytest.approx(3 * math.sqrt(3) * (0.58 * radius) ** 2, rel=0.02)


def test_a_larger_picture_is_the_same_picture() -> None:
    rng = random.Random(0)
    scenes = [draw(rng, "any") for _ in range(50)]
    small, large = render(scenes, 32), render(scenes, 128)
    error = (torch.nn.functional.avg_pool2d(large, 4) - small).abs()
    assert error.mean() < 0.01
    assert error.amax(1).flatten(1).quantile(0.99, 1).mean() < 0.3


def test_edges_are_anti_aliased() -> None:
    def centre_of_mass(x: float) -> float:
        dark = 1 - render([one("circle", x=x)], 32)[0, 0]
        dark = dark - dark[0]
        return float((dark.sum(0) * torch.arange(32)).sum() / dark.sum())

    assert centre_of_mass(0.51) - centre_of_mass(0.5) == pytest.approx(0.32, abs=0.06)


def test_a_scene_does_not_depend_on_its_neighbours() -> None:
    rng = random.Random(0)
    scenes = [draw(rng, "any") for _ in range(20)]
    together = render(scenes, 32)
    assert torch.equal(together[7:8], render([scenes[7]], 32))
    assert together.abs().max() <= 1
    assert render([], 32).shape == (0, 3, 32, 32)


def test_shapes_and_styles_differ() -> None:
    pictures = torch.cat([render([one(shape, "small", style)], 32) for shape in SHAPES for style in STYLES]).flatten(1)
    distances = torch.cdist(pictures, pictures) + 100 * torch.eye(len(pictures))
    assert distances.min() > 1


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel"):
        render([one("star")], 0)
