"""Captions: what is written is read back, what is said holds, and nothing else is a caption."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from mezzotint.worlds.caption import NAMES, NUMBERS, RELATION_WORDS, SIZE_WORDS, describe, parse, write
from mezzotint.worlds.scene import BACKGROUNDS, COLOURS, LIGHTS, RELATIONS, SHAPES, SIZES, STYLES, Description, Mention, Scene, Thing
from mezzotint.worlds.splits import draw


def mention(rng: random.Random, count: int) -> Mention:
    return Mention(rng.choice(SHAPES), count, rng.choice([None, *COLOURS]), rng.choice([None, *SIZES]))


def description(rng: random.Random) -> Description:
    """Any description that has words, likely or not."""
    counts = rng.choice([(1,), (2,), (3,), (4,), (1, 1), (1, 1), (1, 3), (2, 1), (2, 2)])
    placed = rng.choice([None, *RELATIONS]) if counts == (1, 1) else None
    setting = [rng.choice([None, *names]) for names in (BACKGROUNDS, STYLES, LIGHTS)]
    return Description(tuple(mention(rng, count) for count in counts), placed, *setting)


def full(rng: random.Random) -> Description:
    """A description that leaves nothing out."""
    said = description(rng)
    mentions = tuple(Mention(m.shape, m.count, rng.choice(list(COLOURS)), rng.choice(list(SIZES))) for m in said.mentions)
    setting = [rng.choice(list(names)) for names in (BACKGROUNDS, STYLES, LIGHTS)]
    return Description(mentions, said.relation, *setting)


@pytest.mark.parametrize("kind", [description, full])
def test_what_is_written_is_read_back(kind) -> None:
    rng = random.Random(0)
    for _ in range(4000):
        said = kind(rng)
        text = write(said, rng)
        assert parse(text) == said, text


def test_every_word_is_used_and_understood() -> None:
    rng = random.Random(1)
    texts = " . ".join(write(description(rng), rng) for _ in range(6000))
    words = [word for names in NAMES.values() for pair in names for word in pair] + [w for ws in SIZE_WORDS.values() for w in ws]
    words += [*COLOURS, *BACKGROUNDS, *NUMBERS.values(), *(w for ws in RELATION_WORDS.values() for w in ws)]
    assert [word for word in words if word not in texts] == []


def test_one_description_has_many_phrasings() -> None:
    rng = random.Random(2)
    short = Description((Mention("circle", 1, "red"),))
    long = Description((Mention("circle", 1, "red", "large"), Mention("square", 1, "blue", "small")), "left", "white", "outlined", "above")
    assert len({write(short, rng) for _ in range(500)}) >= 10
    assert len({write(long, rng) for _ in range(2000)}) >= 1000


def test_the_article_fits_the_word() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        words = write(description(rng), rng).replace(",", "").split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), f"{article} {word}"


@pytest.mark.parametrize("long", [False, True])
def test_what_is_said_of_a_scene_holds(long: bool) -> None:
    rng = random.Random(4)
    for _ in range(2000):
        scene = draw(rng, "any")
        said = describe(scene, rng, long)
        assert said.holds(scene)
        assert parse(write(said, rng)) == said


def test_a_long_description_leaves_nothing_out() -> None:
    rng = random.Random(5)
    for _ in range(500):
        scene = draw(rng, "any")
        said = describe(scene, rng, long=True)
        assert (said.background, said.style, said.light) == (scene.background, scene.style, scene.light)
        assert all(m.colour and m.size for m in said.mentions)
        assert (said.relation is not None) == ([m.count for m in said.mentions] == [1, 1])
        assert sum(m.count for m in said.mentions) == len(scene.things)


def test_short_descriptions_differ_in_what_they_say_of_things_and_say_nothing_of_the_setting() -> None:
    rng = random.Random(6)
    things = (Thing("star", "red", "small", 0.25, 0.5), Thing("ring", "blue", "large", 0.75, 0.5))
    said = {describe(Scene(things, "white", "flat", "left"), rng) for _ in range(500)}
    assert len(said) == 2**4  # colours, sizes, the relation: said or not; and which thing comes first
    assert {(d.background, d.style, d.light) for d in said} == {(None, None, None)}


def test_a_changed_description_no_longer_holds() -> None:
    """Each kind of lie about a long description is found out: it says all, so that any change contradicts the scene."""
    rng = random.Random(7)
    for _ in range(500):
        scene = draw(rng, "any")
        said = describe(scene, rng, long=True)
        first, *rest = said.mentions
        lies = [
            replace(said, mentions=(replace(first, count=first.count + 1), *rest)),
            replace(said, mentions=(replace(first, colour=next(c for c in COLOURS if all(c != t.colour for t in scene.things))), *rest)),
            replace(said, mentions=(replace(first, shape=next(s for s in SHAPES if all(s != t.shape for t in scene.things))), *rest)),
            replace(said, background=next(b for b in BACKGROUNDS if b != scene.background)),
            replace(said, style=next(s for s in STYLES if s != scene.style)),
            replace(said, light=next(li for li in LIGHTS if li != scene.light)),
        ]
        if said.relation is not None:
            lies.append(replace(said, relation=next(where for where in RELATIONS if where != said.relation)))
        assert [lie for lie in lies if lie.holds(scene)] == []


def test_case_spaces_and_a_full_stop_do_not_matter() -> None:
    said = Description((Mention("star", 1, "red", "small"), Mention("ring", 1, "blue")), "above", "pink")
    assert parse("  A Small RED star\n above a  blue ring, on a pink background. ") == said


@pytest.mark.parametrize(
    "junk",
    [
        "",
        " ",
        "hello",
        "star",
        "red",
        "a red",
        "a dog",
        "a turquoise star",
        "a red small star",
        "five stars",
        "a red star and",
        "and a red star",
        "a red star left of",
        "left of a red star",
        "a red star a blue ring",
        "a red star beside a blue ring",
        "a red star left of above a blue ring",
        "a red star, a blue ring, a green cross",
        "a red star on a purple background",
        "a red star on a white background on a grey background",
        "a red star lit from below",
        "a red star lit from above, lit from the left",
        "a red star with black outlines in flat colours",
        "a picture of",
        "a picture of a picture of a red star",
        "a red star, please",
        "not a red star",
        "a red starfish",
        "a red star; drop table",
    ],
)
def test_anything_else_is_no_caption(junk: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(junk)


def test_a_caption_with_a_word_dropped_or_added_is_no_longer_the_same() -> None:
    """Either it is refused or it says something else: no word goes unread."""
    rng = random.Random(8)
    silent = {
        "a",
        "an",
        "one",
        "and",
        "with",
        "to",
        "the",
        "on",
        "of",
        "in",
        "drawn",
        "this",
        "is",
        "here",
        "we",
        "see",
        "picture",
        "image",
        "drawing",
    }
    for _ in range(1000):
        said = full(rng)
        words = write(said, rng).split()
        at = rng.randrange(len(words))
        changed = [*words[:at], "strange", *words[at:]] if rng.random() < 0.5 else [*words[:at], *words[at + 1 :]]
        if len(changed) < len(words) and words[at].strip(",") in silent:
            continue
        try:
            assert parse(" ".join(changed)) != said, " ".join(changed)
        except ValueError:
            continue
