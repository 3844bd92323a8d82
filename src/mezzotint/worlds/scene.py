"""What is in a picture: the vocabulary of Worlds, complete scenes, and what words say about them.

A `Scene` is the whole truth about a picture: every thing with its place. A `Description` is what a caption says of it:
counts, shapes, perhaps colours, perhaps one relation. The renderer draws scenes, the judge reads them back, and
`Description.holds` decides whether a scene shows what was asked for.
Coordinates are shares of the picture's side: x to the right, y downwards, (0, 0) the upper left corner.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.14),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.97, 0.90, 0.15),
    "green": (0.12, 0.66, 0.24),
    "blue": (0.12, 0.30, 0.92),
    "purple": (0.60, 0.18, 0.78),
}
SIZES: dict[str, float] = {"small": 0.14, "large": 0.20}  # radius; there is room for two large things
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.97),
    "grey": (0.62, 0.62, 0.62),
    "pink": (0.96, 0.80, 0.84),
}
STYLES = ("flat", "shaded", "outlined")
LIGHTS: dict[str, tuple[float, float]] = {"above": (0.0, -1.0), "left": (-1.0, 0.0), "right": (1.0, 0.0)}  # towards the lamp
LOOKS = (18, 1, 1)  # how common the backgrounds, styles and lights are: like looks in found pictures, unequally
RELATIONS: dict[str, tuple[float, float]] = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
LATTICE = 4  # drawn scenes put centres at multiples of 1/4, eight pixels at 32x32: nine places, a shape looks alike at each
GAP = 0.06  # free space between two things, at least: small ones may be diagonal neighbours
MARGIN = 0.03  # free space between a thing and the border, at least


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: a shape in a colour, of a size, with its centre at (x, y)."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a picture shows."""

    things: tuple[Thing, ...]
    background: str
    style: str
    light: str


@dataclass(frozen=True, slots=True)
class Mention:
    """A group of equal things in a caption: "two small red stars". None: the caption does not say."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether a thing is one of those meant."""
        return thing.shape == self.shape and self.colour in (None, thing.colour) and self.size in (None, thing.size)

    def refines(self, other: "Mention") -> bool:
        """Whether whatever fits this fits the other, counts aside."""
        return self.shape == other.shape and other.colour in (None, self.colour) and other.size in (None, self.size)


@dataclass(frozen=True, slots=True)
class Description:
    """What a caption says of a scene. `relation` is where the first mention's thing is, seen from the second's."""

    mentions: tuple[Mention, ...]
    relation: str | None = None
    background: str | None = None
    style: str | None = None
    light: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the scene shows what the description says, and no thing beside it.

        The world of a description is closed, unlike GenEval's photographs: "a star" is a picture of one star and of
        nothing else. Every thing must belong to one mention and every mention must have exactly its count.
        """
        if any(
            said not in (None, shown) for said, shown in zip(self._setting(), (scene.background, scene.style, scene.light), strict=True)
        ):
            return False
        return any(self._relation_holds(groups) for groups in _assignments(self.mentions, list(scene.things)))

    def claims(self, scene: Scene) -> list[bool]:
        """What the description says one by one, and whether the scene shows it: how many things; of each mention that enough of them
        have its shape, are also of its colour, and of its size; the relation; the setting.

        All are true where it holds, and now and then where it does not: a thing may count for two mentions here.
        """
        shown = [len(scene.things) == sum(m.count for m in self.mentions)]
        for m in self.mentions:
            less = [replace(m, colour=None, size=None), replace(m, size=None), m]
            shown += [sum(map(said.fits, scene.things)) >= m.count for said in dict.fromkeys(less)]
        if self.relation is not None:
            first, second = ([thing for thing in scene.things if m.fits(thing)] for m in self.mentions)
            shown.append(any(relation(a, b) == self.relation for a in first for b in second if a is not b))
        setting = zip(self._setting(), (scene.background, scene.style, scene.light), strict=True)
        return shown + [said == here for said, here in setting if said is not None]

    def implies(self, other: "Description") -> bool:
        """Whether every picture of which this holds is one of which the other holds: nothing that the other says is lost here."""
        if any(said not in (None, here) for here, said in zip(self._setting(), other._setting(), strict=True)):
            return False
        ways = product(range(len(other.mentions)), repeat=len(self.mentions))  # whose of the other's each of these are
        return any(self._refines(other, way) for way in ways)

    def _refines(self, other: "Description", way: tuple[int, ...]) -> bool:
        counts = [0] * len(other.mentions)
        for mention, index in zip(self.mentions, way, strict=True):
            counts[index] += mention.count
            if not mention.refines(other.mentions[index]):
                return False
        if counts != [mention.count for mention in other.mentions]:
            return False
        there = OPPOSITE.get(self.relation or "") if way == (1, 0) else self.relation
        return other.relation in (None, there)

    @property
    def open(self) -> int:
        """How much a caption could say and this does not: colours and sizes, the relation of two things, the three of the setting."""
        of_things = sum((m.colour is None) + (m.size is None) for m in self.mentions)
        unplaced = [m.count for m in self.mentions] == [1, 1] and self.relation is None
        return of_things + unplaced + sum(said is None for said in self._setting())

    def _setting(self) -> tuple[str | None, str | None, str | None]:
        return self.background, self.style, self.light

    def _relation_holds(self, groups: list[list[Thing]]) -> bool:
        return self.relation is None or relation(groups[0][0], groups[1][0]) == self.relation


def _assignments(mentions: tuple[Mention, ...], things: list[Thing]) -> list[list[list[Thing]]]:
    """Every way to hand each thing to one mention that fits it, all counts met. At most 4 things: plain recursion."""
    if sum(m.count for m in mentions) != len(things):
        return []
    if not things:
        return [[[] for _ in mentions]]
    ways = []
    for index, mention in enumerate(mentions):
        if mention.count and mention.fits(things[0]):
            left = tuple(Mention(m.shape, m.count - (i == index), m.colour, m.size) for i, m in enumerate(mentions))
            for way in _assignments(left, things[1:]):
                way[index] = [things[0], *way[index]]
                ways.append(way)
    return ways


def direction(dx: float, dy: float) -> str | None:
    """The relation of an offset; None where neither axis clearly leads (the smaller part above 0.7 of the larger)."""
    if min(abs(dx), abs(dy)) > 0.7 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "below" if dy > 0 else "above"


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` is, seen from `b`."""
    return direction(a.x - b.x, a.y - b.y)


def groups(scene: Scene) -> list[tuple[Thing, int]]:
    """The scene's kinds of things (one example of each) with their counts, in order of appearance."""
    kinds = Counter((t.shape, t.colour, t.size) for t in scene.things)
    first = {(t.shape, t.colour, t.size): t for t in reversed(scene.things)}
    return [(first[kind], count) for kind, count in kinds.items()]


def held_out(colour: str, shape: str, where: str | None) -> bool:
    """Whether a composition is kept out of training: the test of whether a model composes or recalls.

    With i and j the places of colour and shape in their lists and o = (j - i) mod 6: pairs with o = 0 are never seen at
    all, pairs with o = 1..4 are never seen in one relation each (left, right, above, below), pairs with o = 5 always are.
    """
    offset = (SHAPES.index(shape) - list(COLOURS).index(colour)) % len(SHAPES)
    return offset == 0 or (where is not None and 1 <= offset <= 4 and list(RELATIONS)[offset - 1] == where)


def is_held_out(scene: Scene) -> bool:
    """Whether any thing of the scene, or any pair of things in its relation, is a held-out composition."""
    if any(held_out(t.colour, t.shape, None) for t in scene.things):
        return True
    if len(scene.things) != 2:
        return False
    a, b = scene.things
    where = relation(a, b)
    return where is not None and (held_out(a.colour, a.shape, where) or held_out(b.colour, b.shape, OPPOSITE[where]))
