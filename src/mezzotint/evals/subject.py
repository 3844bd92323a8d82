"""The suite "subject": how well a personalised student draws the subject of Worlds, and what it forgot for it.

Fidelity is judged on pictures of the rare word, forgetting on pictures of the class without it and on the six tasks of `evals.worlds`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mezzotint.evals import features, worlds
from mezzotint.evals.distance import diversity
from mezzotint.pipeline import Pipeline
from mezzotint.worlds import judge, subject
from mezzotint.worlds.render import render


@dataclass(frozen=True)
class Protocol:
    """pictures: of the subject, and of its class. prompts: per task, of everything else. seed: of the first picture and of the prompts."""

    pictures: int = 64
    prompts: int = 20
    seed: int = 1_000_000


def evaluate(pipeline: Pipeline, protocol: Protocol | None = None, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Every number of the suite for one pipeline.

    fidelity: share of pictures of the rare word that show the subject and nothing else. likeness: mean cosine of their scattering features
    with those of the subject's pictures. class: share of pictures of the class that show one of it. drift: share of these that
    show the subject; the colour is one of six, and this one was held out, so that 0 is what it was. class_diversity: among pictures of
    the class. others: mean over the six tasks.
    """
    protocol = protocol or Protocol()
    n, seed = protocol.pictures, protocol.seed
    tasks = [prompt for task in worlds.TASKS for prompt in worlds.prompts(task, protocol.prompts, "train", seed)]
    asked = [subject.CAPTION] * n + [subject.CLASS] * n + tasks
    images = pipeline(asked, seed=seed, progress=progress)
    of_word, of_class, of_others = images[:n], images[n : 2 * n], images[2 * n :]
    known = features.scattering(render([subject.subject(k) for k in range(subject.PICTURES)], pipeline.config.sampling.side))
    found = features.scattering(of_word)
    right = judge.score(of_others, tasks).reshape(len(worlds.TASKS), protocol.prompts).mean(1).tolist()
    return {
        "suite": "subject",
        "protocol": asdict(protocol) | {"sampling": pipeline.config.sampling.to_data()},
        "fidelity": _share(of_word, subject.SHOWS),
        "likeness": float(F.cosine_similarity(found[:, None], known[None], dim=2).mean()),
        "class": _share(of_class, subject.CLASS),
        "drift": _share(of_class, subject.SHOWS),
        "class_diversity": diversity(of_class, [subject.CLASS] * n),
        "others": mean(right),
        "tasks": dict(zip(worlds.TASKS, right, strict=True)),
    }


def _share(images: Tensor, prompt: str) -> float:
    return float(judge.score(images, [prompt] * len(images)).mean())
