"""The suite "pairs": how well a reward model that was trained here tells winners from losers, on pairs of Worlds that no training shows."""

from collections.abc import Callable, Iterator
from typing import Any

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import WorldsConfig
from mezzotint.pipeline import find_device
from mezzotint.rewards import LearnedConfig
from mezzotint.rewards.pairs import measure

SEED, SIZE = 1_000_000, 256  # of the scenes; pairs of a batch, of which one prompt in eight is held out


def evaluate(place: str, batches: int = 16, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The numbers of `rewards.pairs.measure` for the reward model at `place` (see `LearnedConfig`), on so many batches."""
    source = WorldsConfig(pairs=True, seed=SEED).build()

    def drawn() -> Iterator[Batch]:
        for number in range(batches):
            yield source.batch(number, SIZE).to(find_device())
            if progress is not None:
                progress(number + 1, batches)

    return {"suite": "pairs"} | measure(LearnedConfig(place).build(), drawn())
