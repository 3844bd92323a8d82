"""The suite "enhance": what a writer of longer prompts that was trained here keeps of short captions, and what is drawn then."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mezzotint.data.worlds import WorldsConfig
from mezzotint.pipeline import CONFIG_FILE, Pipeline, find_device, load
from mezzotint.text.enhance import Trained, enhance, source
from mezzotint.worlds import judge
from mezzotint.worlds.caption import lost_scene, worth

SEED = 1_000_000


def evaluate(place: str, prompts: int = 50) -> dict[str, Any]:
    """The numbers of the writer at `place` (see `text.writer`), as `sample --enhance` asks it, on so many short captions.

    kept: share of captions of which nothing was lost; the others are drawn as they were given. said: share of what those kept had left
    open that is then said. distinct: share of different ones among what is drawn. Where the place is a run, whose pipeline is there too,
    also `asked` and `told`, see `drawn`. ValueError for an enhancer of another kind.
    """
    writer = source(place)
    if not isinstance(writer, Trained):
        raise ValueError(f"place must be a run of tiny.enhance, got {place!r}")
    short, long = (WorldsConfig(seed=SEED, long_every=every).build().batch(0, prompts).prompts for every in (0, 1))  # of the same scenes
    found = [enhance(prompt, writer, lost_scene) for prompt in short]
    kept = [worth(prompt, one.prompt)[1] for prompt, one in zip(short, found, strict=True) if not one.note]
    enhanced, export = [one.prompt for one in found], Path(place) / "export"
    result = {
        "suite": "enhance",
        "protocol": {"prompts": prompts, "seed": SEED},
        "kept": len(kept) / prompts,
        "said": mean(kept) if kept else 0.0,
        "distinct": len(set(enhanced)) / prompts,
    }
    return result | (drawn(load(export).to(find_device()), short, enhanced, long) if (export / CONFIG_FILE).is_file() else {})


def drawn(pipeline: Pipeline, short: Sequence[str], enhanced: Sequence[str], long: Sequence[str]) -> dict[str, dict[str, float]]:
    """What a pipeline draws, from the same noise, of short captions, of what was written from them, and of the long ones of their scenes.

    asked: share of the pictures that show what the short caption asks for, by the judge. told: share of those that show all of the text
    that they were drawn from.
    """
    result: dict[str, dict[str, float]] = {"asked": {}, "told": {}}
    for name, texts in (("short", short), ("enhanced", enhanced), ("long", long)):
        images = pipeline(texts, seed=SEED)
        result["asked"][name] = float(judge.score(images, short).mean())
        result["told"][name] = float(judge.score(images, texts).mean())
    return result
