"""Latent consistency distillation (LCM, Luo et al. 2023, algorithm 1; LCM-LoRA is the same in an adapter).

On a fine grid of `grid` times, of which the teacher's solver skips k = `skip` at once, with s the time k places below t:

    x_s = one step of the teacher from x_t, guided by w;    L = E_{t, w} d(f(x_t, t, c, w), sg f_avg(x_s, s, c, w))

f(x, t) = x - t v(x, t), which satisfies f(x, 0) = x by itself; w is drawn anew for every sample and the student is told it, by an
embedding that starts without effect, or by the one that its teacher has. Where the ends of `scales` are equal there is one guidance for
all and nothing to tell: what an adapter that is to be small and to go with others needs. The student samples by `consistency`, told the
scale or with guidance 1.

Where we differ: w is in the scale where 1 is off, theirs is one less; one Euler step of the flow, which is DDIM's; the target's weights
are a role of their own and not the average that is exported; d is the pseudo-Huber distance of a whole sample, theirs of every element.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import from_velocity, interpolate, like
from mezzotint.flow.time import places
from mezzotint.methods.consistency import pseudo_huber
from mezzotint.methods.guidance_distill import guided_by
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn, twin
from mezzotint.methods.teacher import follow, teacher_of, told_copy
from mezzotint.pipeline import Pipeline


@dataclass
class LCMConfig(MethodConfig, kind="lcm"):
    """scales: the least and the largest guidance that the student learns. grid: times from 1 to 0. skip: of them in a step of the teacher.
    shift: of the grid towards noise (`flow.time.shift`). decay: of the target's weights. huber: c of the distance. teacher: see
    `methods.teacher`.
    """

    scales: tuple[float, float] = (1.5, 4.0)
    grid: int = 1000
    skip: int = 20
    shift: float = 1.0
    decay: float = 0.95
    huber: float = 1e-3
    teacher: str = ""

    def build(self, pipeline: Pipeline) -> "LCM":
        return LCM(self, pipeline)


class LCM(Method):
    """Roles: the student, a copy of the pipeline given that is told w if w varies; its frozen teacher; a frozen target that follows it."""

    def __init__(self, config: LCMConfig, pipeline: Pipeline) -> None:
        least, largest = config.scales
        if not 1 <= least <= largest:
            raise ValueError(f"scales must be two that rise from 1 on, got {config.scales}")
        within(1, config.grid, skip=config.skip)
        self.config = config
        untold = least < largest and not pipeline.config.denoiser.distilled
        student = told_copy(pipeline, "guidance") if untold else pipeline
        self.roles = {
            "student": Role(student, averaged=True),
            "teacher": Role(teacher_of(pipeline, config.teacher), trained=False),
            "target": Role(twin(student), trained=False, moved=True),
        }

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config, teacher = self.config, self.pipeline("teacher")
        x0 = batch.x0(self.student)
        times = self.student.config.path.times(config.grid, config.shift).to(x0.device, non_blocking=True)
        place = places(len(batch), config.grid - config.skip + 1)
        t, s = times[place], times[place + config.skip]
        least, largest = config.scales
        w = least + (largest - least) * torch.rand(len(batch))
        x_t = interpolate(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            x_s = x_t + like(s - t, x_t) * guided_by(teacher, teacher.encode(batch.prompts), w, x_t, t)
            target = self.data(self.pipeline("target"), batch.prompts, w, x_s, s)
        loss = pseudo_huber(self.data(self.student, batch.prompts, w, x_t, t) - target, config.huber)
        return loss.mean(), {"t": t, "loss": loss.detach()}

    def data(self, pipeline: Pipeline, prompts: list[str], w: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t): the end of the path from x at times t (B,), under guidance w (B,)."""
        cond = pipeline.encode(prompts)
        if pipeline.config.denoiser.distilled:
            cond = replace(cond, guidance=w)
        return from_velocity(pipeline.velocity(x, t, cond), "data", x, t)

    def after_step(self, step: int) -> None:
        follow(self.pipeline("target"), self.student, self.config.decay)
