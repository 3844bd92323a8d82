"""The judge: right on clean pictures, tolerant of a generator's blur, and not to be fooled."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.worlds import judge
from mezzotint.worlds.caption import describe, write
from mezzotint.worlds.render import render
from mezzotint.worlds.scene import COLOURS, SHAPES, Scene, Thing
from mezzotint.worlds.splits import draw, preference


def scenes(number: int, seed: int = 0, split: str = "any") -> list[Scene]:
    rng = random.Random(seed)
    return [draw(rng, split) for _ in range(number)]


def same(a: Scene | None, b: Scene) -> bool:
    """Equal things, none farther than 0.03 from its twin, in an equal setting."""
    if a is None or (a.background, a.style, a.light) != (b.background, b.style, b.light) or len(a.things) != len(b.things):
        return False
    left = list(b.things)
    for thing in a.things:
        twin = next((t for t in left if _kind(t) == _kind(thing) and (t.x - thing.x) ** 2 + (t.y - thing.y) ** 2 < 0.03**2), None)
        if twin is None:
            return False
        left.remove(twin)
    return True


def _kind(thing: Thing) -> tuple[str, str, str]:
    return thing.shape, thing.colour, thing.size


def degraded(images: Tensor) -> Tensor:
    """What a small generator does: a blur of 0.4 pixels and noise of 0.04."""
    at = torch.arange(-2, 3).float()
    line = torch.exp(-(at**2) / (2 * 0.4**2))
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    return blurred + 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [32, 64])
def test_clean_pictures_are_read_back(size: int) -> None:
    truth = scenes(1000)
    right = sum(map(same, judge.read(render(truth, size)), truth))
    assert right >= 0.995 * len(truth)


def test_blur_and_noise_are_tolerated() -> None:
    truth = scenes(500, seed=1)
    assert sum(map(same, judge.read(degraded(render(truth, 32))), truth)) >= 0.97 * len(truth)


def other_colour(scene: Scene, rng: random.Random) -> Scene:
    first, *rest = scene.things
    return replace(scene, things=(replace(first, colour=rng.choice([c for c in COLOURS if c != first.colour])), *rest))


def other_shape(scene: Scene, rng: random.Random) -> Scene:
    first, *rest = scene.things
    return replace(scene, things=(replace(first, shape=rng.choice([s for s in SHAPES if s != first.shape])), *rest))


def one_less(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, things=scene.things[1:])


def turned(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, things=tuple(replace(t, x=1 - t.x, y=1 - t.y) for t in scene.things))


def swapped(scene: Scene, rng: random.Random) -> Scene:
    first, *rest = scene.things
    last = rest[-1] if rest else first
    return replace(scene, things=(replace(first, colour=last.colour), *rest[:-1], replace(last, colour=first.colour)))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("change", [other_colour, other_shape, one_less, turned, swapped])
def test_what_is_wrong_is_caught(change: Callable[[Scene, random.Random], Scene], size: int) -> None:
    rng = random.Random(2)
    wrong, prompts = [], []
    while len(wrong) < 200:
        scene = draw(rng, "any")
        said = describe(scene, rng, long=rng.random() < 0.5)
        changed = change(scene, rng)
        if changed.things and not said.holds(changed):
            wrong.append(changed)
            prompts.append(write(said, rng))
    assert float(judge.score(render(wrong, size), prompts).mean()) <= 0.01


def test_what_is_right_scores() -> None:
    rng = random.Random(3)
    truth = [draw(rng, "any") for _ in range(200)]
    prompts = [write(describe(s, rng), rng) for s in truth]
    assert float(judge.score(render(truth, 32), prompts).mean()) >= 0.99
    with pytest.raises(ValueError, match="not a caption"):
        judge.score(render(truth[:1], 32), ["a dog"])


def test_credit_is_for_what_is_right_of_a_caption() -> None:
    truth = Scene((Thing("star", "red", "large", 0.25, 0.5), Thing("circle", "blue", "large", 0.75, 0.5)), "white", "flat", "above")
    image = render([truth], 32)
    credits = {
        "a red star to the left of a blue circle": 1.0,
        "a red star to the right of a blue circle": 5 / 6 / 2,  # two things, a star, a red one, a circle, a blue one; not where
        "a red star": 2 / 3 / 2,  # all but that it is alone
        "a green star": 1 / 3 / 2,  # a star
        "three purple squares": 0.0,
    }
    found = judge.credit(image.expand(len(credits), -1, -1, -1), list(credits))
    assert torch.allclose(found, torch.tensor(list(credits.values())))
    assert judge.credit(torch.zeros(1, 3, 32, 32), ["a red star"]) == 0


def test_blends_and_smears_are_no_things() -> None:
    def one(shape: str, colour: str = "red") -> Scene:
        return Scene((Thing(shape, colour, "large", 0.5, 0.5),), "white", "flat", "left")

    blends = [(one("star"), one("circle")), (one("star"), one("ring")), (one("star", "red"), one("star", "blue"))]
    blends += [(one("ring"), one("cross")), (one("cross", "green"), one("cross", "purple"))]
    mixed = torch.cat([(render([a], 32) + render([b], 32)) / 2 for a, b in blends])
    assert judge.read(mixed) == [None] * len(blends)
    half = render([one("circle")], 32)
    half[:, :, :16] = render([Scene((), "white", "flat", "left")], 32)[:, :, :16]
    assert judge.read(half) == [None]


def test_what_is_no_scene_is_none() -> None:
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    empty = render([Scene((), "grey", "flat", "above")], 32)
    assert judge.read(torch.cat([noise, empty, torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), torch.nan)])) == [None] * 6
    with pytest.raises(ValueError, match="pictures must be"):
        judge.read(torch.zeros(1, 3, 16, 16))


def test_a_picture_is_read_alike_alone_and_in_company() -> None:
    images = degraded(render(scenes(70, seed=4), 32))
    together = judge.read(images)
    assert together == judge.read(images)
    assert judge.read(images[40:41]) == together[40:41]


def test_preference_is_that_of_the_scene() -> None:
    truth = scenes(100, seed=5, split="train") + scenes(50, seed=6, split="preferred")
    found = judge.preference(render(truth, 32))
    assert found.shape == (150, 3)
    assert torch.allclose(found.mean(1), torch.tensor([preference(s) for s in truth]))
    assert judge.preference(torch.zeros(1, 3, 32, 32)).sum() == 0
