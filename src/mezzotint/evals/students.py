"""The suite "students": a student of few steps beside its teacher, from the same noise and with as many network calls.

What there is to know of a student is what its teacher does with the same calls, by a good solver, and what it does with many. Both are
drawn from the noise of the student's pictures, so that a picture can be compared with the one that it imitates.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.evals import worlds
from mezzotint.evals.distance import diversity
from mezzotint.flow.solvers import randn_like, straightness
from mezzotint.flow.spectrum import radial_power
from mezzotint.pictures import grid
from mezzotint.pipeline import Pipeline, Sampling
from mezzotint.worlds import judge

SHOWN = 12  # prompts, about, in a file of pictures


@dataclass(frozen=True)
class Protocol:
    """What was asked. prompts: per task of the suite "worlds", on seen compositions. pictures: of each prompt. seed: of the prompts and of
    the first picture. calls: numbers of network calls that are compared. solver: of the teacher with so many calls. reference: steps of
    the teacher by Heun's method, which stand for its whole flow.
    """

    prompts: int = 10
    pictures: int = 4
    seed: int = 1_000_000
    calls: tuple[int, ...] = (1, 2, 4, 8)
    solver: str = "dpmpp_2m"
    reference: int = 16


def evaluate(
    student: Pipeline,
    teacher: Pipeline,
    protocol: Protocol | None = None,
    progress: Callable[[int, int], None] | None = None,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Every number of the suite; `calls` has them for student and teacher at each number of calls.

    score: share of pictures that show what was asked, by the judge. distance: root mean square of the difference to the reference
    picture of the same noise. detail: power of the finest quarter of frequencies, as a share of the reference's: below 1 is blurred.
    diversity: among pictures of one prompt. straightness: of the paths, 0 where they are straight. A student with the solver
    `consistency` draws noise on the way, and its distance is then no error beyond one call. Guided calls of the teacher do twice the work.
    pictures: a file for the first picture of some prompts, a row for each sampler in the order of "rows", all from the same noise.
    """
    protocol = protocol or Protocol()
    asked = prompts(protocol)
    own = student.config.sampling
    theirs = teacher.config.sampling.replace(size=own.size)
    samplers = {"teacher": (teacher, theirs), "reference": (teacher, theirs.replace(solver="heun", steps=protocol.reference))}
    for calls in protocol.calls:
        samplers[f"student {calls}"] = (student, own.replace(steps=calls))
        samplers[f"teacher {calls}"] = (teacher, theirs.replace(solver=protocol.solver, steps=calls))

    drawn: dict[str, Tensor] = {}
    for name, (pipeline, settings) in samplers.items():
        if progress is not None:
            progress(len(drawn), len(samplers))
        drawn[name] = pipeline(asked, protocol.pictures, seed=protocol.seed, settings=settings)
    if pictures is not None:
        shown = [images[:: protocol.pictures][:: max(1, len(asked) // SHOWN)] for images in drawn.values()]
        grid(torch.cat(shown), columns=len(shown[0]), scale=2).save(pictures)
    repeated = [prompt for prompt in asked for _ in range(protocol.pictures)]
    found = {name: measures(images, drawn["reference"], repeated) for name, images in drawn.items()}
    return {
        "suite": "students",
        "protocol": asdict(protocol) | {"student": own.to_data(), "teacher": theirs.to_data()},
        "rows": list(drawn),
        "teacher": found["teacher"],
        "reference": found["reference"],
        "calls": {str(n): {who: found[f"{who} {n}"] for who in ("student", "teacher")} for n in protocol.calls},
        "straightness": {
            "student": path_straightness(student, asked, own, protocol.seed),
            "teacher": path_straightness(teacher, asked, theirs, protocol.seed),
        },
    }


class Beside:
    """A teacher's pictures, drawn once, for a student to be compared with as often as one likes: while it learns, or at many settings.

    size: of the pictures. sampling: the teacher's. found: `measures` of what it draws so. shown: that of other prompts, one picture each
    with seeds 0, 1, ..., as previews have them.
    """

    def __init__(self, teacher: Pipeline, protocol: Protocol, size: int | tuple[int, int], shown: Sequence[str] = ()) -> None:
        self.protocol, self.asked = protocol, prompts(protocol)
        self.sampling = teacher.config.sampling.replace(size=size)
        self.reference = self._drawn(teacher, self.sampling.replace(solver="heun", steps=protocol.reference))
        self.found = self.measures(teacher, self.sampling)
        self.shown = teacher(shown, settings=self.sampling) if shown else None

    def measures(self, pipeline: Pipeline, settings: Sampling) -> dict[str, float]:
        """`measures` of what a pipeline draws from the same noise."""
        images = self._drawn(pipeline, settings)
        return measures(images, self.reference, [prompt for prompt in self.asked for _ in range(self.protocol.pictures)])

    def evaluate(self, student: Pipeline) -> dict[str, Any]:
        """What a student is as it samples: its `measures`, and gap, how much higher the teacher's score is."""
        found = self.measures(student, student.config.sampling)
        asked = asdict(self.protocol) | {"student": student.config.sampling.to_data(), "teacher": self.sampling.to_data()}
        return {"suite": "students", "protocol": asked, **found, "gap": self.found["score"] - found["score"], "teacher": self.found}

    def _drawn(self, pipeline: Pipeline, settings: Sampling) -> Tensor:
        return pipeline(self.asked, self.protocol.pictures, seed=self.protocol.seed, settings=settings)


def prompts(protocol: Protocol) -> list[str]:
    """What is asked, task by task."""
    return [p for task in worlds.TASKS for p in worlds.prompts(task, protocol.prompts, "train", protocol.seed)]


def measures(images: Tensor, reference: Tensor, asked: list[str]) -> dict[str, float]:
    """Pictures (B, 3, H, W) of B prompts beside those of the same noise that they imitate."""
    return {
        "score": float(judge.score(images, asked).float().mean()),
        "distance": float((images - reference).square().mean().sqrt()),
        "detail": fine_power(images) / fine_power(reference),
        "diversity": diversity(images, asked),
    }


def fine_power(images: Tensor) -> float:
    """Mean power of pictures (B, C, H, W) at the finest quarter of their spatial frequencies (`flow.spectrum`)."""
    power = radial_power(images)
    return float(power[..., -(power.shape[-1] // 4) :].mean())


@torch.no_grad()
def path_straightness(pipeline: Pipeline, prompts: list[str], settings: Sampling, seed: int, steps: int = 16) -> float:
    """The mean of `flow.solvers.straightness` from one noise for each prompt, guided as `settings` say."""
    found = []
    for start in range(0, len(prompts), settings.batch):
        cond = pipeline.encode(prompts[start : start + settings.batch])
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(cond))]
        noise = randn_like(cond.text.new_empty(len(cond), *pipeline.codec.latent_shape(settings.shape)), generators)
        times = pipeline.config.path.times(steps, 1.0)
        found.append(straightness(pipeline.guided(cond, settings.guidance), pipeline.entered(noise, times), times))
    return float(torch.cat(found).mean())
