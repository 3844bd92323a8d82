"""Splits: what training sees, what it never does, and the preferred look."""

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import pytest

from mezzotint.worlds.scene import (
    BACKGROUNDS,
    COLOURS,
    GAP,
    LATTICE,
    LIGHTS,
    MARGIN,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    direction,
    held_out,
    is_held_out,
    relation,
)
from mezzotint.worlds.splits import CENTRED, draw, is_centred, middle, prefer, preference

SPLITS = ("train", "held-out", "preferred", "any")


def scenes(split: str, number: int = 1500, seed: int = 0) -> list[Scene]:
    rng = random.Random(f"{split} {seed}")
    return [draw(rng, split) for _ in range(number)]


def compositions(scene: Scene) -> set[tuple[str, str, str | None]]:
    """Each thing's colour and shape, with its place seen from the other thing where there are two."""
    where: list[str | None] = [None] * len(scene.things)
    if len(scene.things) == 2:
        seen = relation(*scene.things)
        where = [seen, OPPOSITE[seen] if seen else None]
    return {(t.colour, t.shape, w) for t, w in zip(scene.things, where, strict=True)}


@pytest.mark.parametrize("split", ["train", "preferred"])
def test_training_never_shows_a_held_out_composition(split: str) -> None:
    for scene in scenes(split):
        assert not any(held_out(*composition) for composition in compositions(scene)), scene
        assert not is_held_out(scene)


def test_held_out_scenes_always_show_one() -> None:
    for scene in scenes("held-out"):
        assert any(held_out(*composition) for composition in compositions(scene)), scene


def test_a_known_share_is_held_out() -> None:
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    never = [pair for pair in pairs if held_out(*pair, None)]
    placed = [(pair, where) for pair in pairs for where in RELATIONS if held_out(*pair, where) and not held_out(*pair, None)]
    assert len(never) == 6
    assert len({colour for colour, _ in never}) == len({shape for _, shape in never}) == 6
    assert len(placed) == 24
    assert set(Counter(where for _, where in placed).values()) == {6}


def test_training_shows_every_other_composition() -> None:
    shown = {composition for scene in scenes("train", 12_000) for composition in compositions(scene)}
    places: list[str | None] = [None, *RELATIONS]
    assert shown == {(c, s, w) for c in COLOURS for s in SHAPES for w in places if not held_out(c, s, w)}


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_is_a_function_of_its_seed(split: str) -> None:
    assert scenes(split, 50) == scenes(split, 50)
    assert scenes(split, 50) != scenes(split, 50, seed=1)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train, held-out, preferred or any"):
        draw(random.Random(0), "test")


@pytest.mark.parametrize("split", SPLITS)
def test_things_stand_inside_and_apart(split: str) -> None:
    for scene in scenes(split):
        assert 1 <= len(scene.things) <= 4
        for thing in scene.things:
            room = SIZES[thing.size] + MARGIN
            assert room <= thing.x <= 1 - room, thing
            assert room <= thing.y <= 1 - room, thing
            assert (thing.x * LATTICE).is_integer(), thing
            assert (thing.y * LATTICE).is_integer(), thing
        for a, b in combinations(scene.things, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > SIZES[a.size] + SIZES[b.size] + GAP, scene


@pytest.mark.parametrize("split", SPLITS)
def test_two_things_stand_in_a_clear_relation(split: str) -> None:
    pairs = [scene for scene in scenes(split) if len(scene.things) == 2]
    assert pairs
    assert all(relation(*scene.things) is not None for scene in pairs)


@pytest.mark.parametrize(
    "names",
    [
        (SHAPES, lambda scene: scene.things[0].shape),
        (COLOURS, lambda scene: scene.things[0].colour),
        (SIZES, lambda scene: scene.things[0].size),
        (BACKGROUNDS, lambda scene: scene.background),
        (STYLES, lambda scene: scene.style),
        (LIGHTS, lambda scene: scene.light),
        (range(1, 5), lambda scene: len(scene.things)),
    ],
)
def test_all_that_there_is_is_drawn(names: tuple[tuple[str, ...], Callable[[Scene], object]]) -> None:
    expected, what = names
    drawn = Counter(what(scene) for scene in scenes("any"))
    assert set(drawn) == set(expected)
    assert min(drawn.values()) > 1500 / len(expected) / 10


def test_preferred_scenes_have_the_whole_preferred_look() -> None:
    assert {preference(scene) for scene in scenes("preferred")} == {1.0}


def test_preference_counts_thirds() -> None:
    def look(style: str, light: str, x: float) -> float:
        return preference(Scene((Thing("star", "red", "small", x, 0.5),), "white", style, light))

    assert look("shaded", "left", 0.5) == 1
    assert look("flat", "left", 0.5) == look("shaded", "right", 0.5) == look("shaded", "left", 0.25) == pytest.approx(2 / 3)
    assert look("flat", "above", 0.5) == pytest.approx(1 / 3)
    assert look("outlined", "above", 0.75) == 0


def test_centred_is_about_the_middle_of_all_things() -> None:
    def pair(x: float) -> Scene:
        return Scene((Thing("star", "red", "small", x, 0.25), Thing("ring", "blue", "small", 0.75, 0.75)), "white", "flat", "left")

    assert middle(pair(0.25)) == (0.5, 0.5)
    assert is_centred(pair(0.25))
    assert is_centred(pair(0.25 + 1.9 * CENTRED))
    assert not is_centred(pair(0.25 + 2.1 * CENTRED))


def test_prefer_keeps_things_and_relations() -> None:
    for scene in scenes("train", 800):
        liked = prefer(scene)
        assert [(t.shape, t.colour, t.size) for t in liked.things] == [(t.shape, t.colour, t.size) for t in scene.things]
        assert liked.background == scene.background
        for (a, b), (c, d) in zip(combinations(scene.things, 2), combinations(liked.things, 2), strict=True):
            assert (a.x - b.x, a.y - b.y) == pytest.approx((c.x - d.x, c.y - d.y))
        for thing in liked.things:
            room = SIZES[thing.size] + MARGIN
            assert min(thing.x, thing.y) >= room
            assert max(thing.x, thing.y) <= 1 - room


def test_prefer_raises_preference_and_is_done_after_once() -> None:
    gained = 0.0
    for scene in scenes("train", 800):
        liked = prefer(scene)
        assert preference(liked) >= max(preference(scene), 2 / 3 - 1e-9)
        assert prefer(liked) == liked
        gained += preference(liked) - preference(scene)
    assert gained / 800 > 0.4


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [(1, 0, "right"), (-1, 0.6, "left"), (0.6, 1, "below"), (-0.6, -1, "above"), (1, 0.8, None), (-0.8, 1, None), (0.5, 0.5, None)],
)
def test_a_direction_needs_a_clear_lead(dx: float, dy: float, expected: str | None) -> None:
    assert direction(dx, dy) == expected
    assert direction(-dx, -dy) == (OPPOSITE[expected] if expected else None)
