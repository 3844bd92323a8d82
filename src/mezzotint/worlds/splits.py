"""Scenes drawn at random: the training split, the held-out compositions, the preferred sliver, and preference pairs.

Every draw takes a `random.Random`, so a scene is a function of its seed.
"""

import math
import random
from dataclasses import replace

from mezzotint.worlds.scene import (
    BACKGROUNDS,
    COLOURS,
    GAP,
    LATTICE,
    LIGHTS,
    LOOKS,
    MARGIN,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    direction,
    is_held_out,
)

PREFERRED_STYLE = "shaded"
PREFERRED_LIGHT = "left"
CENTRED = 0.07  # how far the middle of a composition may be from the middle of the picture


def draw(rng: random.Random, split: str = "train") -> Scene:
    """A scene of a split.

    "train": no held-out composition. "held-out": at least one. "preferred": a training scene in the preferred style and
    light, its things centred. "any": no restriction.
    """
    if split == "preferred":
        scene = prefer(draw(rng, "train"))
        return scene if is_centred(scene) else draw(rng, "preferred")
    if split not in ("train", "held-out", "any"):
        raise ValueError(f"split must be train, held-out, preferred or any, got {split!r}")
    while True:
        scene = _draw(rng)
        if split == "any" or is_held_out(scene) == (split == "held-out"):
            return scene


def _draw(rng: random.Random) -> Scene:
    """One kind of thing, one to four times, or two kinds; positions by rejection."""
    kinds = [_kind(rng) for _ in range(rng.choice((1, 1, 2, 2, 2)))]
    if len(kinds) == 1:
        counts = [rng.randint(1, 4)]
    else:
        counts = [1, 1] if rng.random() < 0.95 else rng.choice(([2, 1], [1, 2], [2, 2], [3, 1], [1, 3]))
        if kinds[0][:2] == kinds[1][:2]:
            kinds[1] = kinds[0]
    if sum(counts) > 2:
        kinds = [(shape, colour, "small") for shape, colour, _ in kinds]
    placed = None
    while placed is None:
        placed = _place(rng, [kind[2] for kind, count in zip(kinds, counts, strict=True) for _ in range(count)])
    names = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    things = tuple(Thing(*kind, x, y) for kind, (x, y) in zip(names, placed, strict=True))
    background, style, light = (rng.choices(list(looks), LOOKS)[0] for looks in (BACKGROUNDS, STYLES, LIGHTS))
    return Scene(things, background, style, light)


def _kind(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(SIZES))


def _place(rng: random.Random, sizes: list[str]) -> list[tuple[float, float]] | None:
    """Places on the lattice for things of these sizes without crowding; two things stand in a clear relation.

    None: no luck, try again.
    """
    placed: list[tuple[float, float]] = []
    for number, size in enumerate(sizes):
        low = math.ceil(_border(size) * LATTICE)
        for _ in range(20):
            x, y = rng.randint(low, LATTICE - low) / LATTICE, rng.randint(low, LATTICE - low) / LATTICE
            apart = all(
                (x - px) ** 2 + (y - py) ** 2 > (SIZES[size] + SIZES[s] + GAP) ** 2 for (px, py), s in zip(placed, sizes, strict=False)
            )
            clear = len(sizes) != 2 or number == 0 or direction(x - placed[0][0], y - placed[0][1]) is not None
            if apart and clear:
                placed.append((x, y))
                break
        else:
            return None
    return placed


def middle(scene: Scene) -> tuple[float, float]:
    """The middle of the composition: the mean of the things' centres."""
    return sum(t.x for t in scene.things) / len(scene.things), sum(t.y for t in scene.things) / len(scene.things)


def is_centred(scene: Scene) -> bool:
    """Whether the composition's middle is near the picture's."""
    x, y = middle(scene)
    return abs(x - 0.5) <= CENTRED and abs(y - 0.5) <= CENTRED


def preference(scene: Scene) -> float:
    """How much of the preferred look a scene has, 0..1: a third each for style, light and a centred composition."""
    return ((scene.style == PREFERRED_STYLE) + (scene.light == PREFERRED_LIGHT) + is_centred(scene)) / 3


def prefer(scene: Scene) -> Scene:
    """The same things in the preferred look: moved together to the middle as far as the borders allow, style and light changed."""
    x, y = middle(scene)
    dx = _shift(0.5 - x, [(t.x, t.size) for t in scene.things])
    dy = _shift(0.5 - y, [(t.y, t.size) for t in scene.things])
    moved = tuple(replace(t, x=t.x + dx, y=t.y + dy) for t in scene.things)
    return replace(scene, things=moved, style=PREFERRED_STYLE, light=PREFERRED_LIGHT)


def _shift(wanted: float, places: list[tuple[float, str]]) -> float:
    """The wanted shift along one axis, in steps of the lattice, cut so that every thing stays inside the picture."""
    low = max(math.ceil((_border(size) - p) * LATTICE) for p, size in places)
    high = min(math.floor((1 - _border(size) - p) * LATTICE) for p, size in places)
    return min(max(round(wanted * LATTICE), low), high) / LATTICE


def _border(size: str) -> float:
    """How near to the picture's edge the centre of a thing may be."""
    return MARGIN + SIZES[size] * 1.02
