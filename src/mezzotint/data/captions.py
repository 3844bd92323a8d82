"""Which of a picture's captions a sample is trained with."""

import random
from collections.abc import Mapping, Sequence


def choose(captions: Mapping[str, Sequence[str]], mix: Mapping[str, float], seed: int, position: int) -> str:
    """One caption, a function of the arguments alone.

    captions: those of each kind ("captions", "captions_short", ...). mix: how often each kind is meant to be drawn, in any unit; the
    kinds that a picture lacks give their share to those it has. seed, position: of the run, and of the sample in its stream.
    "" if no kind of the mix has a caption that is not blank. ValueError for a negative share, and where no kind has one.
    """
    if any(not share >= 0 for share in mix.values()) or not any(mix.values()):
        raise ValueError(f"mix must have shares of at least 0, one of them above, got {dict(mix)}")
    present = {kind: [text for text in captions.get(kind) or () if text and text.strip()] for kind in sorted(mix)}
    kinds = [kind for kind, texts in present.items() if texts and mix[kind] > 0]
    if not kinds:
        return ""
    draw = random.Random(f"{seed} caption {position}")
    (kind,) = draw.choices(kinds, [mix[kind] for kind in kinds])
    return draw.choice(present[kind])
