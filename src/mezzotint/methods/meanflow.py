"""MeanFlow (Geng et al. 2025, algorithm 1): a student that predicts the mean velocity of a step instead of the velocity at its start.

    u(x_t, r, t) = 1 / (t - r) integral of v(x_s, s) over s from r to t,    so that    x_r = x_t - (t - r) u(x_t, r, t)

exactly, in one call. Differentiating (t - r) u by t along the path gives an identity (their eq. 6) that needs no integral, and the loss

    u = v - (t - r) du/dt,    du/dt = (v . d_x + d_t) u;    L = E w || u(x_t, r, t) - sg(v - (t - r) du/dt) ||^2

with w = 1 / (error + 1e-3)^power of each sample. At r = t it is flow matching. The student is told t - r, whose embedding starts
without effect, and samples by `euler` with any number of steps.

`distil`: v is the guided velocity of the network as it starts, frozen; otherwise that of the sample, eps - x0, as in the paper without
guidance. The paper takes du/dt by a Jacobian-vector product; `difference` above 0 takes a quotient of differences instead, which networks
with a fast time embedding need (`flow.rate`).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import interpolate, like
from mezzotint.flow.rate import exact_rate, quotient_rate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.teacher import told_copy
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline


@dataclass
class MeanFlowConfig(MethodConfig, kind="meanflow"):
    """distil, guidance: see above; guidance is of the teacher. same: share of the batch with r = t. difference: 0 for the exact rate.
    power: of the weight, 0 for none. times: of t and r, the larger of two draws and the smaller.
    """

    distil: bool = True
    guidance: float = 2.5
    same: float = 0.5
    difference: float = 0.0
    power: float = 1.0
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "MeanFlow":
        return MeanFlow(self, pipeline)


class MeanFlow(Method):
    """Roles: the student, a copy of the pipeline given that is told t - r; that pipeline as the frozen teacher, if it distils."""

    def __init__(self, config: MeanFlowConfig, pipeline: Pipeline) -> None:
        within(0, 1, same=config.same, difference=config.difference)
        self.config = config
        self.roles = {"student": Role(told_copy(pipeline, "jump"), averaged=True)}
        if config.distil:
            self.roles["teacher"] = Role(pipeline, trained=False)

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config, number = self.config, len(batch)
        x0 = batch.x0(self.student)
        eps = torch.randn_like(x0)
        first, second = config.times.sample(number), config.times.sample(number)
        t = torch.maximum(first, second)
        r = torch.where(torch.rand(number) < config.same, t, torch.minimum(first, second))
        x_t, cond = interpolate(x0, eps, t), self.student.encode(batch.prompts)

        def u(x: Tensor, t: Tensor) -> Tensor:
            return self.student.velocity(x, t, replace(cond, jump=t - r))

        with torch.no_grad():
            v = self._teachers(batch.prompts, x_t, t) if config.distil else eps - x0
            rate = quotient_rate(u, x_t, t, v, config.difference, r, 1.0) if config.difference else exact_rate(u, x_t, t, v)
            target = v - like(t - r, x_t) * rate
        error = (u(x_t, t) - target).square().flatten(1).mean(1)
        weight = (error.detach() + 1e-3) ** -config.power
        return (weight * error).mean(), {"t": t, "loss": error.detach(), "error": error.detach()}

    def _teachers(self, prompts: list[str], x: Tensor, t: Tensor) -> Tensor:
        teacher = self.pipeline("teacher")
        cond: Cond = teacher.encode(prompts)
        return teacher.guided(cond, self.config.guidance)(x, t)
