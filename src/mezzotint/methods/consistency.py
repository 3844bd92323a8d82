"""Consistency distillation (Song et al. 2023, algorithm 2; guided, in latent space: Luo et al. 2023).

With f(x, t) = x - t v(x, t), which satisfies f(x, 0) = x by itself, and two neighbouring times s < t of a grid:

    x_s = one teacher step, guided, from x_t;    L = E d(f(x_t, t), sg f_avg(x_s, s))

Where we differ: the target's weights are the student's moving average that the Trainer keeps no matter what; `segments`
splits [0, 1] as multistep consistency models do (Heek et al. 2024), so that a student of `segments` calls is only asked
to be consistent within each of its own steps and runs them with `euler`. One segment is the original, sampled with the
`consistency` solver. d is the pseudo-Huber distance of iCT. `methods.lcm` has the variant of Luo et al., `methods.consistency_training`
the one without a teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.path import interpolate, like
from mezzotint.flow.time import places, shift
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn, twin
from mezzotint.methods.teacher import follow, teacher_of
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline


@dataclass
class ConsistencyConfig(MethodConfig, kind="consistency"):
    """guidance: of the teacher. grid: teacher steps from 1 to 0, a multiple of segments. decay: of the target's weights.

    shift: of the grid and the segments towards noise (`flow.time.shift`); a student of several segments samples with the same. What is
    decided in a short range of times is then left to several steps instead of one. huber: c of the distance. teacher: see
    `methods.teacher`.
    """

    guidance: float = 2.5
    grid: int = 32
    segments: int = 4
    shift: float = 1.0
    decay: float = 0.95
    huber: float = 0.03
    teacher: str = ""

    def build(self, pipeline: Pipeline) -> "Consistency":
        return Consistency(self, pipeline)


class Consistency(Method):
    """Roles: the student; its frozen teacher; a frozen target that follows the student."""

    def __init__(self, config: ConsistencyConfig, pipeline: Pipeline) -> None:
        if config.grid % config.segments:
            raise ValueError(f"grid must be a multiple of segments, got {config.grid} and {config.segments}")
        self.config = config
        self.roles = {
            "student": Role(pipeline, averaged=True),
            "teacher": Role(teacher_of(pipeline, config.teacher), trained=False),
            "target": Role(twin(pipeline), trained=False, moved=True),
        }

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config = self.config
        x0 = batch.x0(self.student)
        place = places(len(batch), config.grid)
        segment = place.div(config.grid // config.segments, rounding_mode="floor")
        t, s = shift((place + 1) / config.grid, config.shift), shift(place / config.grid, config.shift)
        end = shift(segment / config.segments, config.shift)
        x_t = interpolate(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            x_s = self._teacher_step(batch.prompts, x_t, t, s)
            target = self._to_end(self.pipeline("target"), batch.prompts, x_s, s, end)
        difference = self._to_end(self.student, batch.prompts, x_t, t, end) - target
        # A jump of length t - end scales its error with it: measured as a velocity, all jumps weigh alike.
        loss = pseudo_huber(difference / like(t - end, x0), config.huber)
        return loss.mean(), {"t": t, "loss": loss.detach()}

    def _teacher_step(self, prompts: list[str], x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One guided Euler step of the teacher from t to s."""
        teacher = self.pipeline("teacher")
        cond: Cond = teacher.encode(prompts)
        return x + like(s - t, x) * teacher.guided(cond, self.config.guidance)(x, t)

    def _to_end(self, pipeline: Pipeline, prompts: list[str], x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """One straight jump from t to the end of its segment."""
        return x + like(end - t, x) * pipeline.velocity(x, t, pipeline.encode(prompts))

    def after_step(self, step: int) -> None:
        follow(self.pipeline("target"), self.student, self.config.decay)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """(B,) pseudo-Huber distances (Song & Dhariwal 2023, eq. 7) of a difference (B, ...): its root mean square r as sqrt(r^2 + c^2) - c.

    Theirs is of the sum of squares; for theirs c is ours times the root of the number of elements.
    """
    return (difference.square().flatten(1).mean(1) + c**2).sqrt() - c
