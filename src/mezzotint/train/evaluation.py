"""Evaluation while training: which numbers, how often, which of them decides what is best, and when it is enough."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from mezzotint import config
from mezzotint.data.batch import Source
from mezzotint.errors import UserError
from mezzotint.evals import images, students, subject, worlds
from mezzotint.pipeline import Pipeline, load

LESS_IS_BETTER = ("held_out", "fd_", "kd_", "seconds_", "distance", "gap")
SEED = 2_000_000  # of a student's evaluations: what decides which weights are kept is not what measures them in the end


@dataclass
class EvaluationConfig(config.Config, kind="evaluation"):
    """suite: of `evals`, run every `every` steps and at the end, besides the held-out loss; pictures: of it, a task or in all; of the suite
    "subject", those of the word, as many of its class, and about as many of all else.

    best: the number that decides which weights are kept as `export-best`: "held_out", or one of the suite's, as in "score"; empty: none.
    patience: evaluations in a row without a better one after which training ends; 0: it does not. teacher: with whose pictures the suite
    "students" compares, those of what the run starts from unless given.
    """

    suite: Literal["", "worlds", "images", "students", "subject"] = ""
    every: int = 1000
    pictures: int = 20
    best: str = "held_out"
    patience: int = 0
    teacher: str = ""

    def __post_init__(self) -> None:
        if self.patience and not self.best:
            raise ValueError("patience needs a number to wait for: evaluation.best must not be empty")
        if self.suite == "subject" and self.pictures < 2:
            raise ValueError(f"pictures must be at least 2 for the suite subject, which says how much they differ, got {self.pictures}")

    def compared_with(self, init: str) -> str:
        """The teacher of a run that starts from `init`, for `pipeline.load`; "" for other suites. UserError where there is none."""
        if self.suite != "students":
            return ""
        if not (self.teacher or init):
            remedy = "start from it (--init), name it (--evaluation.teacher), or evaluate otherwise (--evaluation.suite worlds)"
            raise UserError(f"the suite students compares with a teacher, and this run has none; {remedy}")
        return self.teacher or init

    def beside(self, init: str, pipeline: Pipeline, shown: Sequence[str]) -> students.Beside:
        """What the suite "students" compares a pipeline with."""
        teacher = load(self.compared_with(init)).to(next(pipeline.parameters()).device)
        return students.Beside(teacher, students.Protocol(self.pictures, pictures=2, seed=SEED), pipeline.config.sampling.size, shown)

    def measure(self, pipeline: Pipeline, source: Source, beside: students.Beside | None) -> dict[str, Any]:
        """All numbers of the suite, with its protocol: for all but "students" what the verb `eval` gives of the exported pipeline."""
        if beside is not None:
            return beside.evaluate(pipeline)
        suites: dict[str, Callable[[], dict[str, Any]]] = {
            "worlds": lambda: worlds.evaluate(pipeline, worlds.Protocol(self.pictures)),
            "images": lambda: images.evaluate(pipeline, source, images.Protocol(self.pictures)),
            "subject": lambda: subject.evaluate(pipeline, subject.Protocol(self.pictures, max(1, self.pictures // len(worlds.TASKS)))),
        }
        return suites[self.suite]()


@dataclass
class Best:
    """The best evaluation so far. waited: evaluations since."""

    value: float | None = None
    step: int = 0
    waited: int = 0

    def beaten(self, name: str, value: float, step: int) -> bool:
        """Whether a number is better than all before, and is then remembered. One that is not finite never is."""
        sign = -1 if name.startswith(LESS_IS_BETTER) else 1
        if not math.isfinite(value) or (self.value is not None and sign * value <= sign * self.value):
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        return True

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def keep(pipeline: Pipeline, folder: Path, name: str, best: Best) -> None:
    """Write the best pipeline so far and what it is the best in. UserError where the disk does not take it."""
    try:
        pipeline.save(folder)
        part = folder / "best.json.part"
        part.write_text(json.dumps({"measure": name, "value": best.value, "step": best.step}) + "\n")
        part.replace(folder / "best.json")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; free some space and run the same command again") from error


def find(result: dict[str, Any], name: str) -> float:
    """A number of a suite by name. UserError where it has none of that name."""
    value = result.get(name)
    if not isinstance(value, (int, float)):
        known = ", ".join(key for key, number in result.items() if isinstance(number, (int, float)))
        raise UserError(f"evaluation.best is {name!r}, and the suite {result['suite']} has: {known}, besides held_out")
    return float(value)
