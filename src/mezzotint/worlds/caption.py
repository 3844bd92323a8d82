"""Scenes to words and back: what a caption may say, in many phrasings, and what a caption said.

`describe` picks what to mention of a scene, `write` puts it into words, `parse` reads the words back:
``parse(write(d, rng)) == d`` for every description, whatever the phrasing. `shorten` says less; `lost` and `worth` judge who says more.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from mezzotint.text.enhance import lost_words
from mezzotint.worlds.scene import BACKGROUNDS, COLOURS, LIGHTS, STYLES, Description, Mention, Scene, groups, relation

NAMES: dict[str, tuple[tuple[str, str], ...]] = {  # shape: (singular, plural), the usual name first
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"), ("pyramid", "pyramids")),
    "star": (("star", "stars"),),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
STYLE_WORDS = {
    "flat": ("in flat colours", "drawn flat", "flat style"),
    "shaded": ("softly shaded", "with soft shading", "shaded style"),
    "outlined": ("with black outlines", "outlined in black", "outlined style"),
}
LIGHT_WORDS = {
    "left": ("lit from the left", "light coming from the left"),
    "right": ("lit from the right", "light coming from the right"),
    "above": ("lit from above", "light coming from above"),
}
BACKGROUND_WORDS = ("on a {} background", "against a {} backdrop", "on {}")
OPENINGS = ("a picture of", "an image of", "a drawing of", "this is", "here we see")


def describe(scene: Scene, rng: random.Random, long: bool = False, coloured: float = 0.7) -> Description:
    """What one caption says of a scene. A long one leaves nothing out; a short one says how many of which shape,
    more or less of colours (a share `coloured` of captions), sizes and places, and nothing of the setting."""
    kinds = groups(scene)
    if len(kinds) == 2 and rng.random() < 0.5:
        kinds.reverse()
    with_colour = long or rng.random() < coloured
    sized = long or rng.random() < 0.25
    mentions = tuple(Mention(t.shape, count, t.colour if with_colour else None, t.size if sized else None) for t, count in kinds)
    mentions = _merged(mentions)
    placed = None
    if [m.count for m in mentions] == [1, 1] and (long or rng.random() < 0.5):
        placed = relation(kinds[0][0], kinds[1][0])
    return Description(mentions, placed, *((scene.background, scene.style, scene.light) if long else ()))


def shorten(description: Description, rng: random.Random, coloured: float = 0.7) -> Description:
    """Less of what a description says: as `describe` has it in a short caption, and now and then a part of the setting."""
    with_colour, sized = rng.random() < coloured, rng.random() < 0.25
    kept = (replace(m, colour=m.colour if with_colour else None, size=m.size if sized else None) for m in description.mentions)
    mentions = _merged(tuple(kept))
    placed = description.relation if len(mentions) == 2 and rng.random() < 0.5 else None
    setting = [said if rng.random() < 0.15 else None for said in (description.background, description.style, description.light)]
    return Description(mentions, placed, *setting)


def _merged(mentions: tuple[Mention, ...]) -> tuple[Mention, ...]:
    """Two groups that a vague caption cannot tell apart ("a star and a star") are one ("two stars")."""
    if len(mentions) == 2 and replace(mentions[0], count=0) == replace(mentions[1], count=0):
        return (replace(mentions[0], count=mentions[0].count + mentions[1].count),)
    return mentions


def write(description: Description, rng: random.Random) -> str:
    """The description in words, one phrasing of many."""
    parts = [_noun_phrase(m, rng) for m in description.mentions]
    if description.relation is not None:
        sentence = f" {rng.choice(RELATION_WORDS[description.relation])} ".join(parts)
    else:
        sentence = rng.choice((" and ", " and ", " with ", ", ")).join(parts)
    if rng.random() < 0.2:
        sentence = f"{rng.choice(OPENINGS)} {sentence}"
    clauses = _setting_clauses(description, rng)
    return ", ".join([sentence, *clauses]) if rng.random() < 0.7 else " ".join([sentence, *clauses])


def _noun_phrase(mention: Mention, rng: random.Random) -> str:
    singular, plural = NAMES[mention.shape][0] if rng.random() < 0.8 else rng.choice(NAMES[mention.shape])
    adjectives = [] if mention.size is None else [rng.choice(SIZE_WORDS[mention.size])]
    if mention.colour is not None:
        adjectives.append(mention.colour)
    words = [*adjectives, singular if mention.count == 1 else plural]
    if mention.count > 1:
        return " ".join([NUMBERS[mention.count], *words])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join(["one" if rng.random() < 0.1 else article, *words])


def _setting_clauses(description: Description, rng: random.Random) -> list[str]:
    clauses = []
    if description.style is not None:
        clauses.append(rng.choice(STYLE_WORDS[description.style]))
    if description.background is not None:
        clauses.append(rng.choice(BACKGROUND_WORDS).format(description.background))
    if description.light is not None:
        clauses.append(rng.choice(LIGHT_WORDS[description.light]))
    rng.shuffle(clauses)
    return clauses


def _one_of(phrases: Sequence[str]) -> str:
    return "|".join(sorted((re.escape(p) for p in phrases), key=len, reverse=True))


_SHAPE_OF = {word: shape for shape, names in NAMES.items() for pair in names for word in pair}
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_COUNT_OF = {"a": 1, "an": 1, "one": 1, **{word: n for n, word in NUMBERS.items()}}
_RELATION_OF = {words: where for where, phrasings in RELATION_WORDS.items() for words in phrasings}
_NOUN = re.compile(
    rf"(?P<count>{_one_of(list(_COUNT_OF))})"
    rf"(?: (?P<size>{_one_of(list(_SIZE_OF))}))?"
    rf"(?: (?P<colour>{_one_of(list(COLOURS))}))?"
    rf" (?P<shape>{_one_of(list(_SHAPE_OF))})\b"
)
_SETTING = {
    "background": {template.format(name): name for name in BACKGROUNDS for template in BACKGROUND_WORDS},
    "style": {words: style for style in STYLES for words in STYLE_WORDS[style]},
    "light": {words: light for light in LIGHTS for words in LIGHT_WORDS[light]},
}


def parse(text: str) -> Description:
    """The description in a caption that `write` could have written. Raises ValueError where words are left over."""
    rest = re.sub(r"\s+", " ", text.strip().lower().rstrip("."))
    setting: dict[str, str] = {}
    for part, meanings in _SETTING.items():
        found = re.search(rf"(?:^|[ ,])({_one_of(list(meanings))})(?=$|[ ,])", rest)
        if found:
            setting[part] = meanings[found[1]]
            rest = rest[: found.start(1)] + rest[found.end(1) :]
    rest = re.sub(rf"^({_one_of(OPENINGS)}) ", "", rest).strip(" ,")
    nouns = list(_NOUN.finditer(rest))
    mentions = tuple(_mention(noun) for noun in nouns)
    between = rest[nouns[0].end() : nouns[1].start()].strip() if len(nouns) == 2 else ""
    left_over = _NOUN.sub("", rest).strip(" ,").removeprefix(between.strip(",")).strip(" ,")
    joined = between in (",", "and", "with", *_RELATION_OF) if len(nouns) == 2 else len(nouns) == 1
    if left_over or not joined:
        raise ValueError(f"not a caption of Worlds: {text!r}")
    return Description(mentions, _RELATION_OF.get(between), **setting)


def lost(asked: str, longer: str) -> str:
    """What a longer prompt lost, in words: of scenes where both are captions of Worlds, of words otherwise. Empty: nothing."""
    try:
        said, told = parse(asked), parse(longer)
    except ValueError:
        return lost_words(asked, longer)
    return "" if told.implies(said) else "some of the scene"


def lost_scene(asked: str, longer: str) -> str:
    """The same for a writer that knows captions of Worlds and nothing else: whatever is none is lost."""
    for name, text in (("the prompt", asked), ("what was written", longer)):
        try:
            parse(text)
        except ValueError:
            return f"its sense: {name} is no caption of Worlds"
    return lost(asked, longer)


def worth(asked: str, longer: str) -> tuple[float, float]:
    """How good a longer caption is, in two parts of [0, 1]: whether nothing was lost, and how much it says of what was left open.

    The second is 0 where anything was lost, and 1 for a caption that had left nothing open.
    """
    if lost_scene(asked, longer):
        return 0.0, 0.0
    before, after = parse(asked).open, parse(longer).open
    return 1.0, max(0.0, 1 - after / before) if before else 1.0


def _mention(noun: re.Match[str]) -> Mention:
    return Mention(
        shape=_SHAPE_OF[noun["shape"]],
        count=_COUNT_OF[noun["count"]],
        colour=noun["colour"],
        size=_SIZE_OF[noun["size"]] if noun["size"] else None,
    )
