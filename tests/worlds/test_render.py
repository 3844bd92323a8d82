"""The renderer against closed forms, against a plain reference, and against itself at another size."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.worlds.render import DISTANCE, FALL_OFF, INK, OUTLINE, SHADING, render
from mezzotint.worlds.scene import BACKGROUNDS, COLOURS, LIGHTS, SHAPES, SIZES, STYLES, Scene, Thing
from mezzotint.worlds.splits import draw

AREAS = {  # of a shape of radius 1
    "circle": math.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 3 * math.sqrt(3) * 0.58**2,
    "star": 5 * 1.12 * 0.46 * math.sin(math.pi / 5),
    "cross": 2 * 2.0 * 0.64 - 0.64**2,
    "ring": math.pi * (1 - 0.44**2),
}
# The points of these reach out of the square that the renderer paints: outlined ones at any size, others at larger ones.
POINTED = ("triangle", "star")


def drawn(number: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [draw(rng, "any") for _ in range(number)]


def lone(
    shape: str, colour: str = "blue", size: str = "large", style: str = "flat", x: float = 0.5, y: float = 0.5, **setting: str
) -> Scene:
    return Scene((Thing(shape, colour, size, x, y),), setting.get("background", "white"), style, setting.get("light", "above"))


def places(size: int) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(size) + 0.5) / size
    return axis[None, :].expand(size, size), axis[:, None].expand(size, size)


def away(light: str, size: int) -> Tensor:
    x, y = places(size)
    return {"left": x, "right": 1 - x, "above": y}[light]


def unlit(images: Tensor, light: str) -> Tensor:
    """The shares of red, green and blue before the light fell on them."""
    return (images + 1) / 2 / (1 - FALL_OFF * away(light, images.shape[-1]))


def coverage(scene: Scene, size: int) -> Tensor:
    """How much of each pixel a flat thing covers, from the picture alone."""
    ground = torch.tensor(BACKGROUNDS[scene.background])[:, None, None]
    colour = torch.tensor(COLOURS[scene.things[0].colour])[:, None, None]
    change = unlit(render([scene], size)[0], scene.light) - ground
    return (change * (colour - ground)).sum(0) / (colour - ground).square().sum()


def reference(scene: Scene, size: int) -> Tensor:
    """One picture, every thing painted over all of it, pixel formulas only."""
    x, y = places(size)
    image = torch.tensor(BACKGROUNDS[scene.background])[:, None, None].expand(3, size, size)
    for thing in scene.things:
        radius = SIZES[thing.size]
        px, py = (x - thing.x) / radius, (y - thing.y) / radius
        distance = DISTANCE[thing.shape](px, py) * radius * size
        fill = torch.tensor(COLOURS[thing.colour])[:, None, None].expand(3, size, size)
        if scene.style == "shaded":
            dx, dy = LIGHTS[scene.light]
            shade = SHADING * (dx * px + dy * py)
            fill = torch.where(shade < 0, fill * (1 + shade.clamp(min=-1)), fill + (1 - fill) * shade.clamp(max=1))
        if scene.style == "outlined":
            band = distance.abs() - OUTLINE / 2 * size
            fill = fill + (INK - fill) * (0.5 - band).clamp(0, 1)
            distance = torch.minimum(distance, band)
        image = image + (fill - image) * (0.5 - distance).clamp(0, 1)
    return (image * (1 - FALL_OFF * away(scene.light, size))).clamp(0, 1) * 2 - 1


def lone_scenes(shapes: tuple[str, ...]) -> Iterator[Scene]:
    rng = random.Random(3)
    for shape in shapes:
        for size in SIZES:
            for style in STYLES:
                x, y = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)
                yield lone(
                    shape,
                    rng.choice(list(COLOURS)),
                    size,
                    style,
                    x,
                    y,
                    background=rng.choice(list(BACKGROUNDS)),
                    light=rng.choice(list(LIGHTS)),
                )


def test_shape_range_and_type() -> None:
    images = render(drawn(50), 24)
    assert images.shape == (50, 3, 24, 24)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.flatten(1).std(1).min() > 0.05


def test_no_scenes_give_no_pictures() -> None:
    assert render([], 16).shape == (0, 3, 16, 16)


def test_a_picture_has_at_least_one_pixel() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel"):
        render(drawn(1), 0)


@pytest.mark.parametrize("size", [32, 64, 100])
def test_agrees_with_the_reference(size: int) -> None:
    scenes = list(lone_scenes(tuple(shape for shape in SHAPES if shape not in POINTED)))
    assert torch.allclose(render(scenes, size), torch.stack([reference(scene, size) for scene in scenes]), atol=1e-4)


def test_pointed_things_agree_with_the_reference_at_32() -> None:
    scenes = [scene for scene in lone_scenes(POINTED) if scene.style != "outlined"]
    assert torch.allclose(render(scenes, 32), torch.stack([reference(scene, 32) for scene in scenes]), atol=1e-4)


def test_pointed_things_agree_with_the_reference() -> None:
    scenes = list(lone_scenes(POINTED))
    assert torch.allclose(render(scenes, 64), torch.stack([reference(scene, 64) for scene in scenes]), atol=1e-4)


def test_things_of_one_picture_do_not_disturb_each_other() -> None:
    scenes = [scene for scene in drawn(200, 1) if scene.style != "outlined"]
    assert max(len(scene.things) for scene in scenes) == 4
    assert torch.allclose(render(scenes, 32), torch.stack([reference(scene, 32) for scene in scenes]), atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    scenes = [s for s in drawn(200, 2) if s.style != "outlined" or not any(thing.shape in POINTED for thing in s.things)]
    together = render(scenes, 32)
    assert torch.allclose(together, torch.cat([render([scene], 32) for scene in scenes]), atol=0.02)


def test_an_outlined_picture_does_not_depend_on_its_batch() -> None:
    scenes = [s for s in drawn(200, 2) if s.style == "outlined"]
    assert torch.allclose(render(scenes, 32), torch.cat([render([scene], 32) for scene in scenes]), atol=1e-4)


@pytest.mark.parametrize(("style", "tolerance"), [("flat", 0.02), ("shaded", 0.02), ("outlined", 0.05)])
def test_looks_alike_at_every_size(style: str, tolerance: float) -> None:
    """Root mean square on the scale from -1 to 1. Ink is about a pixel wide at 32, where half pixels matter most."""
    scenes = [replace(scene, style=style) for scene in drawn(300, 3)]
    small, large = render(scenes, 32), F.avg_pool2d(render(scenes, 64), 2)
    assert (small - large).square().mean().sqrt() < tolerance


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_covers_its_area(shape: str, size: int) -> None:
    for radius in SIZES:
        for dx in (0.0, 0.3, 0.5):
            covered = coverage(lone(shape, size=radius, x=0.5 + dx / size, y=0.5 - dx / size), size).sum() / size**2
            expected = AREAS[shape] * SIZES[radius] ** 2
            assert covered == pytest.approx(expected, rel=(0.02 if shape in ("circle", "square") else 0.05) * 32 / size)


def test_edges_are_anti_aliased() -> None:
    covered = coverage(lone("circle"), 64)
    assert covered.min() > -1e-4
    assert covered.max() < 1 + 1e-4
    between = ((covered > 0.02) & (covered < 0.98)).sum()
    # A line that goes once around the circle crosses 8 r pixels; each shares one or two of its neighbours' sides.
    radius = SIZES["large"] * 64
    assert 0.6 * 8 * radius < between < 1.4 * 8 * radius


def test_moves_by_less_than_a_pixel() -> None:
    """A tenth of a pixel to the right changes the picture by a tenth of what a whole pixel does, and moves the centroid so."""
    x, _ = places(32)
    start, step = coverage(lone("square", x=0.5), 32), coverage(lone("square", x=0.5 + 0.1 / 32), 32)
    moved = ((step * x).sum() / step.sum() - (start * x).sum() / start.sum()) * 32
    assert moved == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("style", STYLES)
def test_all_shapes_differ(style: str) -> None:
    for size in SIZES:
        images = render([lone(shape, size=size, style=style) for shape in SHAPES], 32).flatten(1)
        apart = torch.cdist(images, images) + 99 * torch.eye(len(SHAPES))
        thing = (images - render([Scene((), "white", style, "above")], 32).flatten(1)).norm(dim=1)
        assert apart.amin() > 0.15 * thing.amax()


@pytest.mark.parametrize("light", LIGHTS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_ground_falls_off_from_the_lamp(background: str, light: str) -> None:
    image = render([Scene((), background, "flat", light)], 32)[0]
    ground = torch.tensor(BACKGROUNDS[background])[:, None, None].expand(3, 32, 32)
    assert torch.allclose(unlit(image, light), ground, atol=1e-5)


@pytest.mark.parametrize("light", LIGHTS)
def test_shading_is_brighter_towards_the_lamp(light: str) -> None:
    image = unlit(render([lone("circle", style="shaded", light=light)], 64)[0], light).mean(0)
    dx, dy = LIGHTS[light]
    near, far = ((round(32 + sign * 9 * dy), round(32 + sign * 9 * dx)) for sign in (1, -1))
    assert image[near] > image[32, 32] > image[far]


def test_styles_are_told_apart_by_colour_and_ink() -> None:
    flat, outlined = (unlit(render([lone("square", style=style)], 64)[0], "above") for style in ("flat", "outlined"))
    blue = torch.tensor(COLOURS["blue"])
    assert torch.allclose(flat[:, 32, 32], blue, atol=1e-4)
    assert torch.allclose(outlined[:, 32, 32], blue, atol=1e-4)
    edge = round((0.5 + 0.86 * SIZES["large"]) * 64)
    assert outlined[:, 32, edge].max() < 0.2
    assert flat[:, 32, edge - 2].sub(blue).abs().max() < 1e-4


def test_the_order_of_things_is_free() -> None:
    scenes = [scene for scene in drawn(60, 4) if len(scene.things) > 1]
    turned = [Scene(scene.things[::-1], scene.background, scene.style, scene.light) for scene in scenes]
    assert torch.allclose(render(scenes, 32), render(turned, 32), atol=1e-5)
