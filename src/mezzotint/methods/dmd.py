"""Distribution matching distillation to a few steps (DMD2, Yin et al. 2024, algorithm 1), without its GAN term.

The student's samples x are renoised to y = (1 - t) x + t eps, and x is moved to where the teacher's clean estimate of y
differs from that of a critic trained on the student's own samples:

    g = (x0_critic(y) - x0_teacher(y)) / mean|x - x0_teacher(y)|;    L = 1/2 ||x - sg(x - g)||^2

The critic takes `critic_turns` optimizer steps for each of the student's (two time scales). The student's inputs are what
it meets when it samples (backward simulation): its own outputs, renoised, at one of its `steps` times drawn at random.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import from_velocity, interpolate, like
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import flow_error, levelled
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn, twin
from mezzotint.methods.teacher import teacher_of
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline


@dataclass
class DMDConfig(MethodConfig, kind="dmd"):
    """steps: network calls of the student, sampled with `consistency`. guidance: of the teacher. times: of renoising; in the student's
    loss they are shrunk to `span`. level: of the critic's loss, see `methods.denoise`. teacher: see `methods.teacher`.

    The span is that of the paper, steps 20 to 980 of Stable Diffusion's 1,000, on the linear path. With less noise teacher and critic
    differ by their errors alone, which the norm makes as large as all else.
    """

    steps: int = 4
    guidance: float = 2.5
    critic_turns: int = 4
    level: float = 0.0
    times: TimeDensity = field(default_factory=lambda: TimeDensity(uniform=1.0))
    span: tuple[float, float] = (0.12, 0.93)
    teacher: str = ""

    def build(self, pipeline: Pipeline) -> "DMD":
        return DMD(self, pipeline)


class DMD(Method):
    """Roles: the student; its frozen teacher; a critic that denoises the student's samples, the teacher at first."""

    def __init__(self, config: DMDConfig, pipeline: Pipeline) -> None:
        least, most = config.span
        within(0, 1, span=least)
        within(least, 1, span=most)
        self.config, teacher = config, teacher_of(pipeline, config.teacher)
        self.roles = {
            "student": Role(pipeline, averaged=True),
            "teacher": Role(teacher, trained=False),
            "critic": Role(twin(teacher)),
        }

    def turns(self, step: int) -> Sequence[Turn]:
        return [("critic",)] * self.config.critic_turns + [("student",)]

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        if turn == ("critic",):
            with torch.no_grad():
                x = self._draw(batch)
            t = self.config.times.sample(len(batch))
            error = flow_error(self.pipeline("critic"), x, torch.randn_like(x), t, self.pipeline("critic").encode(batch.prompts))
            return (levelled(t, self.config.level) * error).mean(), {"t": t, "loss": error.detach()}
        x = self._draw(batch)
        least, most = self.config.span
        t = least + (most - least) * self.config.times.sample(len(batch))
        with torch.no_grad():
            direction = self._direction(x, t, batch.prompts)
        loss = (x - (x - direction).detach()).square().flatten(1).mean(1) / 2
        return loss.mean(), {"t": t, "loss": loss.detach(), "direction": direction.abs().flatten(1).mean(1)}

    def _draw(self, batch: Batch) -> Tensor:
        """Samples of the student after a random number of its steps; gradients flow through the last one only."""
        times = self.student.times(self.student.config.sampling.replace(steps=self.config.steps))
        cond: Cond = self.student.encode(batch.prompts)
        x = self.student.entered(torch.randn_like(batch.x0(self.student)), times)
        times = times.to(x.device, non_blocking=True)
        stop = random.randrange(self.config.steps)  # the same for all micro-batches: it decides what is called
        for number, t in enumerate(times[: stop + 1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number == stop):
                now = t.expand(len(x))
                clean = from_velocity(self.student.velocity(x, now, cond), "data", x, now)
            if number < stop:
                x = interpolate(clean, torch.randn_like(x), times[number + 1].expand(len(x)))
        return clean

    def _direction(self, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """The normalised difference of critic and guided teacher (DMD2, eq. 2); zero where both agree."""
        y = interpolate(x, torch.randn_like(x), t)
        teacher, critic = self.pipeline("teacher"), self.pipeline("critic")
        cond = teacher.encode(prompts)
        real = y - like(t, y) * teacher.guided(cond, self.config.guidance)(y, t)
        fake = y - like(t, y) * critic.velocity(y, t, critic.encode(prompts))
        scale = (x - real).abs().flatten(1).mean(1).clamp_min(1e-3)
        return (fake - real) / like(scale, x)
