"""Words for scenes, and back."""

import random

import pytest

from mezzotint.worlds.caption import describe, parse, write
from mezzotint.worlds.scene import Description, Mention
from mezzotint.worlds.splits import draw


@pytest.mark.parametrize("long", [False, True])
def test_what_is_written_is_read_back_and_true(long: bool) -> None:
    rng = random.Random(0)
    for _ in range(3000):
        scene = draw(rng, "any")
        said = describe(scene, rng, long)
        text = write(said, rng)
        assert parse(text) == said, text
        assert said.holds(scene), text


def test_a_long_caption_leaves_nothing_out() -> None:
    rng = random.Random(1)
    for _ in range(200):
        said = describe(draw(rng), rng, long=True)
        assert None not in (said.background, said.style, said.light)
        assert all(m.colour and m.size for m in said.mentions)


def test_there_are_many_phrasings() -> None:
    rng = random.Random(0)
    said = Description((Mention("circle", 1, "red"), Mention("star", 1, "blue")), "above")
    texts = {write(said, rng) for _ in range(500)}
    assert len(texts) > 30
    assert {parse(text) for text in texts} == {said}


@pytest.mark.parametrize(
    "text", ["", "a dog", "five red stars", "a red star beside a blue circle", "a star and a ring and a cross", "red star"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_capitals_full_stops_and_spaces_do_not_matter() -> None:
    assert parse("  A  red Star above a blue circle. ") == parse("a red star above a blue circle")
