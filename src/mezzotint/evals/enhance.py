"""The suite "enhance": what a writer of longer prompts that was trained here keeps of short captions, and what it adds."""

from statistics import mean
from typing import Any

from mezzotint.data.worlds import WorldsConfig
from mezzotint.text.enhance import Trained, enhance, source
from mezzotint.worlds.caption import lost_scene, worth

SEED = 1_000_000


def evaluate(place: str, prompts: int = 50) -> dict[str, Any]:
    """The numbers of the writer at `place` (see `text.writer`), as `sample --enhance` asks it, on so many short captions.

    kept: share of captions of which nothing was lost; the others are drawn as they were given. said: share of what those kept had left
    open that is then said. distinct: share of different ones among what was written. ValueError for an enhancer of another kind.
    """
    writer = source(place)
    if not isinstance(writer, Trained):
        raise ValueError(f"place must be a run of tiny.enhance, got {place!r}")
    short = WorldsConfig(seed=SEED, long_every=prompts + 1).build().batch(0, prompts).prompts
    found = [enhance(prompt, writer, lost_scene) for prompt in short]
    kept = [worth(prompt, one.prompt)[1] for prompt, one in zip(short, found, strict=True) if not one.note]
    return {
        "suite": "enhance",
        "protocol": {"prompts": prompts, "seed": SEED},
        "kept": len(kept) / prompts,
        "said": mean(kept) if kept else 0.0,
        "distinct": len({one.prompt for one in found}) / prompts,
    }
