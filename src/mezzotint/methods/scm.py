"""Consistency distillation in continuous time (sCM, Lu & Song 2024, section 4; of a guided flow: SANA-Sprint, Chen et al. 2025).

On the trigonometric path x = cos(a) x0 + sin(a) eps, with F the student's velocity on it, f(x, a) = cos(a) x - sin(a) F is consistent if
it stays the same along the teacher's path, dx/da = F_teacher. With r warming from 0 to 1 the tangent and the loss are

    g = -cos(a)^2 (F - F_teacher) - r cos(a) sin(a) (x + dF/da);    L = E || F - sg(F + g / (|g| + 0.1)) ||^2

where g = cos(a) df/da at r = 1. No step of the path is discretised and no other network is a target. A linear flow is the same in other
coordinates (`flow.path`): tan(a) = t / (1 - t), x is x_t scaled to unit variance and F the "vp_velocity", so that any network can be a
student; it samples by `consistency`.

Where we differ: |g| is a root mean square over elements; times have no weights, and none is learned; data are taken to have a standard
deviation of 1; dF/da is a quotient of differences where `difference`, an angle, is above 0 (`flow.rate`).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import from_velocity, interpolate, like
from mezzotint.flow.rate import exact_rate, quotient_rate
from mezzotint.flow.solvers import Denoise
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.teacher import teacher_of
from mezzotint.pipeline import Pipeline


@dataclass
class SCMConfig(MethodConfig, kind="scm"):
    """guidance: of the teacher. warmup: steps until r is 1. difference: of angles, 0 for the exact rate. times: of training. teacher: see
    `methods.teacher`.
    """

    guidance: float = 2.5
    warmup: int = 1000
    difference: float = 0.0
    times: TimeDensity = field(default_factory=lambda: TimeDensity(mean=-1.0, std=1.4))
    teacher: str = ""

    def build(self, pipeline: Pipeline) -> "SCM":
        return SCM(self, pipeline)


class SCM(Method):
    """Roles: the student; its frozen teacher."""

    def __init__(self, config: SCMConfig, pipeline: Pipeline) -> None:
        within(1, math.inf, warmup=config.warmup)
        within(0, 1, difference=config.difference)
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True), "teacher": Role(teacher_of(pipeline, config.teacher), trained=False)}

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config, teacher = self.config, self.pipeline("teacher")
        x0 = batch.x0(self.student)
        t = config.times.sample(len(batch))
        x_t = interpolate(x0, torch.randn_like(x0), t)
        a, cond = torch.atan2(t, 1 - t), self.student.encode(batch.prompts)
        x = x_t / like((t**2 + (1 - t) ** 2).sqrt(), x_t)
        velocity = trigonometric(lambda x, t: self.student.velocity(x, t, cond))
        with torch.no_grad():
            theirs = trigonometric(teacher.guided(teacher.encode(batch.prompts), config.guidance))(x, a)
            if config.difference:
                rate = quotient_rate(velocity, x, a, theirs, config.difference, 0.0, math.pi / 2)
            else:
                rate = exact_rate(velocity, x, a, theirs)
        ours = velocity(x, a)
        with torch.no_grad():
            g = tangent(ours, theirs, rate, x, a, min(1.0, (step + 1) / config.warmup))
            size = g.square().flatten(1).mean(1).sqrt()
            target = ours + g / like(size + 0.1, g)
        loss = (ours - target).square().flatten(1).mean(1)
        return loss.mean(), {"t": t, "loss": loss.detach(), "tangent": size}


def trigonometric(denoise: Denoise) -> Denoise:
    """F(x, a), the velocity by the angle a within [0, pi / 2] at x of unit variance, of a denoise function of the linear path."""

    def velocity(x: Tensor, a: Tensor) -> Tensor:
        scale = a.sin() + a.cos()
        t, x_t = (a.sin() / scale).clamp(0, 1), x / like(scale, x)
        return from_velocity(denoise(x_t, t), "vp_velocity", x_t, t)

    return velocity


def tangent(ours: Tensor, theirs: Tensor, rate: Tensor, x: Tensor, a: Tensor, r: float) -> Tensor:
    """g, from F of student and teacher at (x, a) and dF/da of the student along the teacher's path."""
    cosine, sine = like(a.cos(), x), like(a.sin(), x)
    return -(cosine**2) * (ours - theirs) - r * cosine * sine * (x + rate)
