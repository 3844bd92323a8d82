"""What is drawn: splits, places, and the preferred look."""

import random

import pytest

from mezzotint.worlds.render import OUTLINE
from mezzotint.worlds.scene import (
    COLOURS,
    GAP,
    LATTICE,
    MARGIN,
    SHAPES,
    SIZES,
    Description,
    Mention,
    Scene,
    Thing,
    held_out,
    is_held_out,
    relation,
)
from mezzotint.worlds.splits import draw, is_centred, prefer, preference


def scenes(split: str, number: int = 500) -> list[Scene]:
    rng = random.Random(split)
    return [draw(rng, split) for _ in range(number)]


def test_training_never_shows_what_is_held_out() -> None:
    assert not any(map(is_held_out, scenes("train", 2000)))
    assert all(map(is_held_out, scenes("held-out")))
    seen = {(t.colour, t.shape) for s in scenes("train", 2000) for t in s.things}
    assert seen == {(c, s) for c in COLOURS for s in SHAPES if not held_out(c, s, None)}
    assert len(seen) == 30


def test_every_colour_and_every_shape_is_seen() -> None:
    things = [t for s in scenes("train", 2000) for t in s.things]
    assert {t.colour for t in things} == set(COLOURS)
    assert {t.shape for t in things} == set(SHAPES)


@pytest.mark.parametrize("split", ["train", "held-out", "preferred", "any"])
def test_things_have_room(split: str) -> None:
    assert OUTLINE < GAP
    for scene in scenes(split):
        for i, a in enumerate(scene.things):
            assert min(a.x, a.y, 1 - a.x, 1 - a.y) >= SIZES[a.size] + MARGIN
            assert a.x * LATTICE == round(a.x * LATTICE)
            for b in scene.things[:i]:
                assert ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 >= SIZES[a.size] + SIZES[b.size] + GAP
        if len(scene.things) == 2:
            assert relation(*scene.things) is not None


def test_the_preferred_look_is_a_look_and_keeps_the_things() -> None:
    assert all(preference(scene) == 1 for scene in scenes("preferred"))
    base = sum(map(preference, scenes("train"))) / 500
    assert 0.25 < base < 0.45
    for scene in scenes("train", 200):
        better = prefer(scene)
        assert [(t.shape, t.colour, t.size) for t in better.things] == [(t.shape, t.colour, t.size) for t in scene.things]
        if len(scene.things) == 2:
            assert relation(*better.things) == relation(*scene.things)
        assert better.background == scene.background


def test_a_scene_is_a_function_of_its_seed() -> None:
    assert draw(random.Random("a")) == draw(random.Random("a"))
    assert draw(random.Random("a")) != draw(random.Random("b"))
    with pytest.raises(ValueError, match="split"):
        draw(random.Random(0), "test")


def test_centred_is_about_the_middle_of_all_things() -> None:
    pair = (Thing("star", "red", "small", 0.25, 0.5), Thing("ring", "blue", "small", 0.75, 0.5))
    assert is_centred(Scene(pair, "white", "flat", "left"))
    assert not is_centred(Scene(pair[:1], "white", "flat", "left"))


def test_a_description_means_exactly_what_it_says() -> None:
    def thing(shape: str, colour: str, x: float) -> Thing:
        return Thing(shape, colour, "small", x, 0.5)

    scene = Scene((thing("star", "red", 0.25), thing("ring", "blue", 0.75)), "white", "flat", "left")
    star, ring = Mention("star", 1, "red"), Mention("ring", 1, "blue")
    assert Description((star, ring), "left").holds(scene)
    assert Description((ring, star), "right").holds(scene)
    assert not Description((star, ring), "right").holds(scene)
    assert not Description((star,)).holds(scene), "nothing beside it"
    assert not Description((star, ring), style="shaded").holds(scene)
    assert not Description((Mention("star", 1, "blue"), Mention("ring", 1, "red"))).holds(scene), "attributes swapped"
    assert not Description((Mention("star", 2),)).holds(scene)
    same = Scene((thing("star", "red", 0.25), thing("star", "blue", 0.75)), "white", "flat", "left")
    assert Description((Mention("star"), Mention("star", 1, "red")), "right").holds(same), "the vague one must be the blue one"
