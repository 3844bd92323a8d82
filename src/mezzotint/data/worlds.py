"""Worlds as a source of batches: endless captioned scenes, drawn when they are asked for."""

import random
from dataclasses import dataclass, replace

from mezzotint import config
from mezzotint.data.batch import Batch
from mezzotint.worlds import subject
from mezzotint.worlds.caption import describe, write
from mezzotint.worlds.render import render
from mezzotint.worlds.splits import draw, prefer


@dataclass
class WorldsConfig(config.Config, kind="worlds"):
    """size: side in pixels. split: see `worlds.splits.draw`, or "subject" for the few pictures of `worlds.subject` again and again.

    pairs: preference pairs, the winner in the preferred look.

    long_every: one batch in so many has long captions, which leave nothing out, 0 for none; a whole batch, so that the short
    captions of the others are not padded to their length. coloured: share of the short captions that name colours.
    mistaken: share of the captions that are of another scene, as many on the web are.
    """

    size: int = 32
    split: str = "train"
    pairs: bool = False
    long_every: int = 5
    coloured: float = 0.7
    mistaken: float = 0.0
    seed: int = 0

    def build(self) -> "Worlds":
        return Worlds(self)


class Worlds:
    """A `Source` of scenes. The training stream and the held-out part come from different seeds of the same split."""

    def __init__(self, config: WorldsConfig) -> None:
        self.config = config

    @property
    def version(self) -> str:
        return "worlds 1"  # to be raised by whoever changes what a seed draws

    def batch(self, number: int, size: int) -> Batch:
        every = self.config.long_every
        return self._batch(f"train-{number}", size, long=every > 0 and number % every == every - 1)

    def held_out(self, size: int) -> Batch:
        return self._batch("held-out", size, long=False)

    def _batch(self, name: str, size: int, long: bool) -> Batch:
        if self.config.split == "subject":
            rows = [row % subject.PICTURES for row in range(size)]
            images = render([subject.subject(row) for row in rows], self.config.size)
            return Batch(images, [subject.CAPTION] * size, [f"worlds-subject-{row}" for row in rows])
        names = [f"worlds-{self.config.seed}-{self.config.split}-{name}-{row}" for row in range(size)]
        scenes, prompts = [], []
        for name in names:
            rng = random.Random(name)
            scenes.append(draw(rng, self.config.split))
            mistaken = random.Random(f"{name}-mistaken").random() < self.config.mistaken
            told = draw(rng, self.config.split) if mistaken else scenes[-1]
            description = describe(told, rng, long, self.config.coloured)
            if self.config.pairs:  # both pictures must be what the caption says
                description = replace(description, style=None, light=None)
            prompts.append(write(description, rng))
        images = render(scenes, self.config.size)
        if not self.config.pairs:
            return Batch(images, prompts, names)
        return Batch(render([prefer(scene) for scene in scenes], self.config.size), prompts, names, rejected=images)
