"""ReFL (Xu et al. 2023, algorithm 1): a differentiable reward, pushed back through the last steps of sampling.

Sample without gradients to a random one of the last steps; there take the clean estimate with gradients, decode and rate it:

    x0 = x_t - t v(x_t, t, c);    L = weight E relu(margin - r(decode(x0), c)) + anchor E ||v - (eps - x0_data)||^2

The second term, the flow loss on the batch's pictures, keeps the student a model of data; the margin stops pushing where pictures are good.
With `through` = K and `last` = 1 it is DRaFT-K (Clark et al. 2023): gradients through K whole steps to the end.

Where we differ: both terms are one loss, where the paper alternates. Each prompt is drawn twice, so that the difference between the two
pictures reports diversity.
"""

import random
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.errors import UserError
from mezzotint.evals.distance import diversity
from mezzotint.flow.path import like
from mezzotint.flow.solvers import randn_like
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import flow_error
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.pipeline import Pipeline
from mezzotint.rewards.goal import Goal, GoalConfig, RewardError
from mezzotint.rewards.model import LearnedConfig


@dataclass
class ReFLConfig(MethodConfig, kind="refl"):
    """goal: a reward with a gradient, and what is watched. steps: of a drawing. last: so many of them may be the one that is rated.

    through: steps that gradients flow through. margin: a reward above it is not pushed. weight: of the reward. anchor: of the flow
    loss, at `times`.
    """

    goal: GoalConfig = field(default_factory=lambda: GoalConfig(reward=LearnedConfig()))
    steps: int = 10
    last: int = 3
    through: int = 1
    margin: float = 2.0
    weight: float = 1.0
    anchor: float = 1.0
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "ReFL":
        return ReFL(self, pipeline)


class ReFL(Method):
    """Roles: the student."""

    def __init__(self, config: ReFLConfig, pipeline: Pipeline) -> None:
        if not 1 <= config.last <= config.steps:
            raise ValueError(f"last must be within [1, {config.steps}], the steps, got {config.last}")
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True)}

    @cached_property
    def goal(self) -> Goal:
        """The rewards, read when they are first needed."""
        return self.config.goal.build()

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        config = self.config
        prompts = batch.prompts[: -(-len(batch) // 2)] * 2
        stop = config.steps - 1 - random.randrange(config.last)  # the same for all micro-batches: it decides what is called
        images, t = self._draw(batch, prompts, stop)
        reward, kind = self.goal.score(images, prompts), config.goal.reward.kind
        good = reward.isfinite()
        if not good.any():
            raise RewardError(f"reward {kind!r} failed on all {len(prompts)} pictures of step {step}; see {config.goal.failures}")
        if images.requires_grad and not reward.requires_grad:
            raise UserError(f"ReFL needs a reward with a gradient, and {kind!r} has none; take a learned one, or method flow_grpo")
        missing = (config.margin - reward.where(good, config.margin)).relu().sum() / len(prompts)
        anchor = self._anchor(batch)
        shown = images.detach()
        return config.weight * missing + config.anchor * anchor, {
            "t": t,
            "reward": reward.detach().nanmean().nan_to_num(),
            "held_out_reward": self.goal.watch(shown, prompts).nanmean().nan_to_num(),
            "diversity": torch.full((), diversity(shown, prompts)),
            "failed": (~good).float(),
            "anchor": anchor.detach(),
        }

    def _draw(self, batch: Batch, prompts: list[str], stop: int) -> tuple[Tensor, Tensor]:
        """Pictures of prompts as they are seen at step `stop` of Euler's method, and its time (B,)."""
        student, settings = self.student, self.student.config.sampling
        times = student.times(settings.replace(steps=self.config.steps))
        size = (batch.images.shape[-2], batch.images.shape[-1])
        noise = randn_like(batch.images.new_empty(len(prompts), *student.codec.latent_shape(size)), None)
        x, grad = student.entered(noise, times), torch.is_grad_enabled()
        times = times.to(x, non_blocking=True)
        denoise = student.guided(student.encode(prompts), settings.guidance, interval=settings.interval, rule=settings.rule)
        for number in range(stop + 1):
            t = times[number].expand(len(x))
            s = times[number + 1] if number < stop else torch.zeros_like(times[0])
            with torch.set_grad_enabled(grad and number > stop - self.config.through):
                x = x + like(s - t, x) * denoise(x, t)
        return student.codec.decode(x).float(), t

    def _anchor(self, batch: Batch) -> Tensor:
        """The flow loss on the batch's own pictures; 0 where it has no weight."""
        if not self.config.anchor:
            return batch.images.new_zeros(())
        x0 = batch.x0(self.student)
        t = self.config.times.sample(len(batch))
        return flow_error(self.student, x0, torch.randn_like(x0), t, self.student.encode(batch.prompts)).mean()
