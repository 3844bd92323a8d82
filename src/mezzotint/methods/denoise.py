"""Flow matching (Lipman et al. 2022, eq. 9; Liu et al. 2022, eq. 1): pre-training, continued training and fine-tuning.

    L = E_{t, x0, eps} || v(x_t, t, c) - (eps - x0) ||^2

The loss is on the velocity whatever the network predicts. In terms of x0 that is a weight of 1 / t^2, which hands the
gradient to the least noisy samples, where there is the least to learn; below the time `level` the weight stays what it is there.

`detail` adds the squared differences of the error between neighbouring pixels. The conditional mean minimises every
positive definite quadratic form of the error, so this does not move the minimum. It changes the way there: power falls off with
frequency in pictures, so that the plain loss learns edges and corners last, and differences weigh them up.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.path import interpolate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline


def flow_difference(pipeline: Pipeline, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Predicted minus true velocity at x_t, in float32. Shape of x0."""
    return pipeline.velocity(interpolate(x0, eps, t), t, cond).float() - (eps - x0)


def flow_error(pipeline: Pipeline, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """(B,) squared error of the velocity at x_t, averaged over elements."""
    return flow_difference(pipeline, x0, eps, t, cond).square().flatten(1).mean(1)


def levelled(t: Tensor, level: float) -> Tensor:
    """The weight that keeps the velocity loss of a data prediction from growing as 1 / t^2 below the time `level`; 0: all ones."""
    return (t / level).clamp_max(1).square() if level else torch.ones_like(t)


def roughness(x: Tensor) -> Tensor:
    """(B,) mean squared difference between vertical neighbours of x (B, ..., H, W) plus that between horizontal ones."""
    return x.diff(dim=-2).square().flatten(1).mean(1) + x.diff(dim=-1).square().flatten(1).mean(1)


@dataclass
class DenoiseConfig(MethodConfig, kind="denoise"):
    """drop: share of captions dropped, for guidance. level, detail: see above; 0 is the plain loss. times: of training."""

    drop: float = 0.1
    level: float = 0.0
    detail: float = 0.0
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "Denoise":
        return Denoise(self, pipeline)


class Denoise(Method):
    """Roles: the student."""

    def __init__(self, config: DenoiseConfig, pipeline: Pipeline) -> None:
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True)}

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        x0 = batch.x0(self.student)
        cond = self.student.drop(batch.conditions(self.student), torch.rand(len(batch)) < self.config.drop)
        t = self.config.times.sample(len(batch))
        difference = flow_difference(self.student, x0, torch.randn_like(x0), t, cond)
        error = difference.square().flatten(1).mean(1)
        loss = error + self.config.detail * roughness(difference) if self.config.detail else error
        return (levelled(t, self.config.level) * loss).mean(), {"t": t, "loss": error.detach()}
