"""Guidance distillation (Meng et al. 2023, stage one): a student that is told the guidance scale, and draws with one call a step.

    L = E_{w ~ U[1, largest]} || v(x_t, t, c, w) - [v_u + w (v_c - v_u)] ||^2,    v_c = teacher(x_t, t, c),    v_u = teacher(x_t, t)

A step of the student costs half of a guided one. FLUX.1 dev is such a student. The scale is embedded as the time is and starts
without effect, so that at the first step the student is the teacher without guidance. Negative prompts have no effect any more.

Where we differ: w is in the scale where 1 is off, theirs is one less; their loss is of the data with weight max(SNR, 1), ours of the
velocity (see `level`).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import above
from mezzotint.flow.path import interpolate, like
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import levelled
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.teacher import told_copy
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline


@dataclass
class GuidanceDistillConfig(MethodConfig, kind="guidance_distill"):
    """largest: of the scales that the student learns, from 1. level: of the loss, see `methods.denoise`. times: of training."""

    largest: float = 5.0
    level: float = 0.0
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "GuidanceDistill":
        return GuidanceDistill(self, pipeline)


class GuidanceDistill(Method):
    """Roles: the pipeline given as the frozen teacher; the student, a copy of it that is told the scale."""

    def __init__(self, config: GuidanceDistillConfig, pipeline: Pipeline) -> None:
        above(1, largest=config.largest)
        self.config = config
        self.roles = {"student": Role(told_copy(pipeline, "guidance"), averaged=True), "teacher": Role(pipeline, trained=False)}

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        teacher = self.pipeline("teacher")
        x0 = batch.x0(self.student)
        t = self.config.times.sample(len(batch))
        scale = 1 + (self.config.largest - 1) * torch.rand(len(batch))
        x_t = interpolate(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            target = guided_by(teacher, teacher.encode(batch.prompts), scale, x_t, t)
        cond = replace(self.student.encode(batch.prompts), guidance=scale)
        error = (self.student.velocity(x_t, t, cond) - target).square().flatten(1).mean(1)
        return (levelled(t, self.config.level) * error).mean(), {"t": t, "loss": error.detach()}


def guided_by(pipeline: Pipeline, cond: Cond, scale: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity under classifier-free guidance by a scale (B,) for every sample, both branches in one network call.

    A network that was distilled with guidance is told the scales instead.
    """
    if pipeline.config.denoiser.distilled:
        return pipeline.velocity(x, t, replace(cond, guidance=scale))
    pair = Cond.cat([cond, pipeline.null(cond)])
    v_c, v_u = pipeline.velocity(torch.cat([x, x]), torch.cat([t, t]), pair).chunk(2)
    return v_u + like(scale, x) * (v_c - v_u)
