"""The suite "worlds": its prompts, and what it says of pictures whose truth is known."""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.evals.worlds import COMPOSED, TASKS, Protocol, evaluate, prompts
from mezzotint.pipeline import Pipeline, Sampling
from mezzotint.worlds.caption import parse
from mezzotint.worlds.render import render
from mezzotint.worlds.scene import OPPOSITE, Description, Scene, held_out
from mezzotint.worlds.splits import draw


class Painter:
    """Stands in for a pipeline: draws, for each prompt, a scene that some rule picks."""

    def __init__(self, pick: Callable[[str, random.Random], Scene]) -> None:
        self.pick = pick
        self.config = SimpleNamespace(sampling=Sampling(steps=1))

    def __call__(self, asked: Sequence[str], n: int = 1, *, seed: int = 0, progress: Any = None, **_: Any) -> Tensor:
        rng = random.Random(seed)
        if progress:
            progress(1, 1)
        return render([self.pick(prompt, rng) for prompt in asked for _ in range(n)], 32)


def right(prompt: str, rng: random.Random) -> Scene:
    while True:
        scene = draw(rng, "any")
        if parse(prompt).holds(scene):
            return scene


def run(pick: Callable[[str, random.Random], Scene], number: int = 4) -> dict[str, Any]:
    painter: Any = Painter(pick)
    pipeline: Pipeline = painter
    return evaluate(pipeline, Protocol(prompts=number))


def test_a_painter_that_draws_what_is_asked_scores_one() -> None:
    seen: list[tuple[int, int]] = []
    painter: Any = Painter(right)
    result = evaluate(painter, Protocol(prompts=2), progress=lambda done, total: seen.append((done, total)))
    assert result["score"] > 0.97
    assert result["heldout"] > 0.97
    assert set(result["heldout_tasks"]) == set(COMPOSED)
    assert seen[-1][0] == seen[-1][1]


def test_a_painter_that_draws_anything_scores_little() -> None:
    result = run(lambda prompt, rng: draw(rng, "train"))
    assert result["score"] < 0.2
    assert 0.03 < result["preference"] < 0.25
    preferred = run(lambda prompt, rng: draw(rng, "preferred"))
    assert preferred["preference"] > 0.95
    assert preferred["preference_parts"].keys() == {"style", "light", "centred"}


def test_distance_knows_training_scenes_from_grey() -> None:
    near, far = run(lambda p, rng: draw(rng, "train"), 8), run(lambda p, rng: draw(random.Random(0), "train"), 8)
    assert near["fd_scatter2-32"] < far["fd_scatter2-32"]
    assert near["diversity"] > far["diversity"] == 0


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_fixed_by_their_seed_and_of_their_task(task: str) -> None:
    first = prompts(task, 20, "train", seed=1)
    assert first == prompts(task, 20, "train", seed=1)
    assert first[:10] == prompts(task, 10, "train", seed=1)
    assert first != prompts(task, 20, "train", seed=2)
    for description in map(parse, first):
        assert (len(description.mentions) == 2) == (task in ("two objects", "position", "binding"))
        assert (description.relation is not None) == (task == "position")
        assert all((m.colour is not None) == (task in COMPOSED) for m in description.mentions)


@pytest.mark.parametrize("task", COMPOSED)
def test_held_out_prompts_name_what_training_never_shows(task: str) -> None:
    def unseen(description: Description) -> bool:
        where = description.relation
        wheres = (where, OPPOSITE[where]) if where else (None, None)
        return any(held_out(m.colour or "", m.shape, w) for m, w in zip(description.mentions, wheres, strict=False))

    assert all(unseen(parse(prompt)) for prompt in prompts(task, 20, "held-out", seed=1))
    assert not any(unseen(parse(prompt)) for prompt in prompts(task, 20, "train", seed=1))


def test_the_numbers_are_finite() -> None:
    result = run(right, 2)
    assert all(torch.tensor(v).isfinite() for v in result.values() if isinstance(v, float))
