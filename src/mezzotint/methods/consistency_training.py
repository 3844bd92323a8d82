"""Consistency training, without a teacher (CT, Song et al. 2023, algorithm 3; as improved by iCT, Song & Dhariwal 2023).

On a grid of N times, s < t neighbours, both points of a pair are made of one picture and one noise:

    L = E 1 / (t - s) d(f(x_t, t), sg f(x_s, s)),    x_t = (1 - t) x0 + t eps,    x_s = (1 - s) x0 + s eps,    f(x_0, 0) = x_0

eps - x0 is an unbiased estimate of the velocity there, so that in the limit of small steps this is the distillation of the data's own
flow. N doubles after every `stage` steps, from `first` to `last`: coarse grids learn fast and are biased, fine ones the other way
round. f(x, t) = x - t v(x, t) satisfies f(x, 0) = x by itself; d is the pseudo-Huber distance. The target has the student's own weights:
iCT shows that an average of them is biased. An interval is drawn as often as a time of `times` falls into it, which for a logit-normal
density is iCT's discretised log-normal of noise levels (section 3.5). The student samples by `consistency`, unguided.

Where we differ: the grid is even in t after `shift` and reaches pure noise, where iCT's is Karras' and ends at a noise of 80, and weights
are of the steps in t; both are the same near data. Started from a flow (``--init``) it tunes that (Geng et al. 2024).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.flow.domain import within
from mezzotint.flow.path import from_velocity, interpolate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.consistency import pseudo_huber
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.pipeline import Pipeline


@dataclass
class ConsistencyTrainingConfig(MethodConfig, kind="consistency_training"):
    """first, last: numbers of steps of the grid. stage: optimizer steps after which the number doubles. shift: of the grid towards noise
    (`flow.time.shift`). huber: c of the distance. times: of training.
    """

    first: int = 10
    last: int = 1280
    stage: int = 500
    shift: float = 1.0
    huber: float = 0.00054
    times: TimeDensity = field(default_factory=lambda: TimeDensity(mean=-1.1, std=2.0))

    @property
    def stages(self) -> int:
        """How many grids there are, the last among them (iCT, section 3.4)."""
        return (self.last // self.first).bit_length()

    def steps(self, step: int) -> int:
        """N of optimizer step 0, 1, ..."""
        return min(self.first << min(step // self.stage, self.stages), self.last)

    def build(self, pipeline: Pipeline) -> "ConsistencyTraining":
        return ConsistencyTraining(self, pipeline)


class ConsistencyTraining(Method):
    """Roles: the student."""

    def __init__(self, config: ConsistencyTrainingConfig, pipeline: Pipeline) -> None:
        within(1, config.last, first=config.first)
        within(1, math.inf, stage=config.stage)
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True)}

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config = self.config
        x0 = batch.x0(self.student)
        eps = torch.randn_like(x0)
        number = config.steps(step)
        grid = self.student.config.path.times(number, config.shift).to(x0.device, non_blocking=True)
        t, s = interval(config.times.sample(len(batch)), grid)
        ours = self.data(batch.prompts, interpolate(x0, eps, t), t)
        with torch.no_grad():
            target = self.data(batch.prompts, interpolate(x0, eps, s), s)
        loss = pseudo_huber(ours - target, config.huber) / (t - s)
        return loss.mean(), {"t": t, "loss": loss.detach(), "steps": torch.full((), float(number))}

    def data(self, prompts: list[str], x: Tensor, t: Tensor) -> Tensor:
        """f(x, t): the end of the path from x at times t (B,)."""
        return from_velocity(self.student.velocity(x, t, self.student.encode(prompts)), "data", x, t)


def interval(t: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower end (B,) of the intervals of a falling grid (N + 1,) that times (B,) fall into; the first for those above."""
    place = (grid[:, None] >= t).sum(0).clamp(1, len(grid) - 1)
    return grid[place - 1], grid[place]
