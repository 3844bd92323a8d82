"""Where it fits: which of its captions a picture comes with."""

import random
from collections.abc import Mapping, Sequence


def choose(captions: Mapping[str, Sequence[str]], mix: Mapping[str, float], seed: int, position: int) -> str:
    """The caption at a position of the stream: of a column by the weights of the mix, among those that have any; one of its variants.

    "" where none has. A pure function of its arguments.
    """
    weights = {name: weight for name, weight in mix.items() if captions[name]}
    if not weights:
        return ""
    draw = random.Random(f"{seed} caption {position}")
    (name,) = draw.choices(list(weights), list(weights.values()))
    return draw.choice(captions[name])
