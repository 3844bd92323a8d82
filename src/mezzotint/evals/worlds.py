"""The suite "worlds": GenEval's six tasks (Ghosh et al. 2023) on Worlds, scored by its exact judge.

A score is the share of pictures in which the judge finds what the prompt asks for, and nothing beside it; the overall
score is the unweighted mean over the six tasks, as in GenEval.
"""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from mezzotint.evals import features
from mezzotint.evals.distance import diversity, frechet, kernel
from mezzotint.pipeline import Pipeline, Sampling
from mezzotint.worlds import judge
from mezzotint.worlds.caption import write
from mezzotint.worlds.render import render
from mezzotint.worlds.scene import OPPOSITE, Description, Mention, Scene, groups, held_out, relation
from mezzotint.worlds.splits import draw


def _mentions(scene: Scene, coloured: bool) -> tuple[Mention, ...]:
    return tuple(Mention(t.shape, count, t.colour if coloured else None) for t, count in groups(scene))


def _counts(scene: Scene) -> list[int]:
    return [count for _, count in groups(scene)]


def _two_shapes(scene: Scene) -> bool:
    return _counts(scene) == [1, 1] and len({t.shape for t in scene.things}) == 2


def _placed(scene: Scene) -> Description:
    first, second = scene.things
    return Description(_mentions(scene, coloured=True), relation(first, second))


# Each task: which scenes it asks for, and what it says of them.
TASKS: dict[str, tuple[Callable[[Scene], bool], Callable[[Scene], Description]]] = {
    "one object": (lambda s: len(s.things) == 1, lambda s: Description(_mentions(s, coloured=False))),
    "two objects": (_two_shapes, lambda s: Description(_mentions(s, coloured=False))),
    "counting": (lambda s: len(groups(s)) == 1 and len(s.things) > 1, lambda s: Description(_mentions(s, coloured=True))),
    "colours": (lambda s: len(s.things) == 1, lambda s: Description(_mentions(s, coloured=True))),
    "position": (_two_shapes, _placed),
    "binding": (
        lambda s: _two_shapes(s) and len({t.colour for t in s.things}) == 2,
        lambda s: Description(_mentions(s, coloured=True)),
    ),
}
COMPOSED = ("counting", "colours", "position", "binding")  # the tasks that name colours: others cannot ask for what was held out


@dataclass(frozen=True)
class Protocol:
    """What was asked. prompts: per task, one picture each. seed: of the prompts and of the first picture."""

    prompts: int = 50
    seed: int = 1_000_000


def prompts(task: str, number: int, split: str, seed: int) -> list[str]:
    """Prompts of a task about scenes of a split ("train" or "held-out")."""
    fits, describe = TASKS[task]
    rng = random.Random(f"worlds-eval-{task}-{split}-{seed}")
    out: list[str] = []
    while len(out) < number:
        scene = draw(rng, split)
        if fits(scene) and (split != "held-out" or _names_held_out(describe(scene))):
            out.append(write(describe(scene), rng))
    return out


def _names_held_out(said: Description) -> bool:
    """Whether the words, and not just the scene behind them, contain a held-out composition."""
    wheres = (said.relation, OPPOSITE[said.relation]) if said.relation else (None, None)
    return any(m.colour is not None and held_out(m.colour, m.shape, where) for m, where in zip(said.mentions, wheres, strict=False))


def evaluate(
    pipeline: Pipeline,
    protocol: Protocol | None = None,
    settings: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every number of the suite for one pipeline.

    score, tasks: on seen compositions. heldout, heldout_tasks: on compositions that training never shows, for the tasks
    that name any. preference: how much of the preferred look the pictures of seen compositions have, and its three parts.
    fd, kd: distance of those pictures from renders of as many training scenes, in the feature space named. diversity:
    among pictures of one prompt. seconds_per_image: wall time of sampling.
    """
    protocol = protocol or Protocol()
    settings = settings or pipeline.config.sampling
    tasks = [(task, "train") for task in TASKS] + [(task, "held-out") for task in COMPOSED]
    asked = [p for task, split in tasks for p in prompts(task, protocol.prompts, split, protocol.seed)]
    seen = protocol.prompts * len(TASKS)
    varied = asked[: seen : max(1, protocol.prompts // 2)]
    total = len(asked) + 4 * len(varied)

    start = time.perf_counter()
    images = pipeline(asked, seed=protocol.seed, settings=settings, progress=_part(progress, 0, len(asked), total))
    seconds = (time.perf_counter() - start) / len(asked)
    again = pipeline(varied, 4, seed=protocol.seed, settings=settings, progress=_part(progress, len(asked), 4 * len(varied), total))

    right = judge.score(images, asked).reshape(len(tasks), protocol.prompts).mean(1).tolist()
    scores = {split: {task: x for (task, s), x in zip(tasks, right, strict=True) if s == split} for split in ("train", "held-out")}
    style, light, centred = judge.preference(images[:seen]).mean(0).tolist()
    rng = random.Random(f"worlds-eval-reference-{protocol.seed}")
    reference = features.scattering(render([draw(rng) for _ in range(seen)], settings.side))
    found = features.scattering(images[:seen])
    return {
        "suite": "worlds",
        "protocol": asdict(protocol) | {"sampling": settings.to_data()},
        "score": mean(scores["train"].values()),
        "tasks": scores["train"],
        "heldout": mean(scores["held-out"].values()),
        "heldout_tasks": scores["held-out"],
        "preference": mean((style, light, centred)),
        "preference_parts": {"style": style, "light": light, "centred": centred},
        f"fd_{features.NAME}": frechet(found, reference),
        f"kd_{features.NAME}": kernel(found, reference),
        "diversity": diversity(again, [p for p in varied for _ in range(4)]),
        "seconds_per_image": seconds,
    }


def _part(progress: Callable[[int, int], None] | None, before: int, here: int, total: int) -> Callable[[int, int], None] | None:
    """The progress of some of the pictures as progress of all."""
    if progress is None:
        return None
    return lambda done, of: progress(before + here * done // of, total)
