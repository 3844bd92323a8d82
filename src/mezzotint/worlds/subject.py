"""A subject for personalisation: a thing that no picture of training shows, in a few pictures, under a word that no caption has.

The colour and shape are a held-out composition, so that the judge, which knows every composition, sees whether a student draws the
subject where it is asked for, and whether other things of its class turn into it.
"""

from mezzotint.worlds.scene import Scene, Thing

WORD = "zzz"  # its letters stand where they stand in no word of a caption
SHAPE, COLOUR = "ring", "purple"
CAPTION, CLASS = f"a {WORD} {SHAPE}", f"a {SHAPE}"
SHOWS = f"a {COLOUR} {SHAPE}"  # what the judge asks of a picture of the subject
PICTURES = 4

_PLACES = ((0.5, 0.5), (0.25, 0.5), (0.75, 0.25), (0.5, 0.75))


def subject(number: int) -> Scene:
    """Picture `number` of the subject; they repeat after `PICTURES`."""
    x, y = _PLACES[number % PICTURES]
    return Scene((Thing(SHAPE, COLOUR, "large", x, y),), background="white", style="flat", light="above")
