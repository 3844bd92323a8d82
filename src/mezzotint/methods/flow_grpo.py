"""Flow-GRPO (Liu et al. 2025): policy gradients for flows, whose sampler is made stochastic so that its steps have densities.

A step is pi(x_s | x_t, c) = N(mean, std^2) under a `Law` of `flow.solvers`. Of each prompt a group of pictures is drawn and rated; the
loss is that of `methods.policy`, E max(-A rho, -A clip(rho)) + kl KL, at every stochastic step, with

    rho = pi(x_s | x_t, c) / pi_old(x_s | x_t, c);    KL(pi || pi_ref) = ||mean - mean_ref||^2 / (2 std^2)

Training draws with fewer steps than the pipeline does (denoising reduction): it needs rewards that tell pictures apart, not fine
pictures. Variants are settings: DanceGRPO (Xue et al. 2025) has the law "constant" and one noise for a group; Flow-GRPO-Fast and
MixGRPO (Li et al. 2025) are stochastic in a `window` of steps only, and learn from these alone.

Where we differ: log-densities and KL are both means over elements, and the KL has the |dt| that the published code lacks, so `clip`
and `kl` do not depend on the size of the picture or the number of steps; every update learns from all pictures, where theirs
halves them. A group without differences has no advantage and stays in the batch, so that all ranks do the same work.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mezzotint.data.batch import Batch, Loader
from mezzotint.evals.distance import diversity
from mezzotint.flow.solvers import Law, Step, constant, cps, flow_sde, grpo, kl, log_prob, randn_like, sit, transition
from mezzotint.methods.method import Method, Metrics, Role, Turn, twin
from mezzotint.methods.policy import PolicyConfig, advantages, grouped, policy_loss, told
from mezzotint.pipeline import Pipeline
from mezzotint.rewards.goal import Goal, GoalConfig

LAWS: dict[str, Callable[[float], Law]] = {"grpo": grpo, "sit": sit, "constant": constant, "cps": cps}


@dataclass
class FlowGRPOConfig(PolicyConfig, kind="flow_grpo"):
    """group, updates, clip, kl: see `methods.policy`. goal: what is rewarded, and what is watched. steps: of a roll-out.

    law, level: of the noise, see `flow.solvers`. shared: whether a group starts from one noise. window: so many steps are stochastic, 0:
    all but the last; it lies at random in the first half (slide = 0) or moves on by one step every `slide` steps of training, from noise to
    data and again. rows: pictures at once in a network.
    """

    goal: GoalConfig = field(default_factory=GoalConfig)
    steps: int = 10
    law: Literal["grpo", "sit", "constant", "cps"] = "grpo"
    level: float = 0.7
    shared: bool = False
    window: int = 0
    slide: int = 0
    rows: int = 128

    def build(self, pipeline: Pipeline) -> "FlowGRPO":
        return FlowGRPO(self, pipeline)


@dataclass(kw_only=True)
class Transition(Batch):
    """One step of many roll-outs: `images` are the latents x_t that it started from.

    after: x_s. t, s: (B,) times. log_prob: (B,) under the policy that drew it. advantage, reward, held_out: (B,) of the pictures that
    came of it; a reward that failed is NaN. diversity: of these pictures, see `evals.distance`.
    """

    after: Tensor
    t: Tensor
    s: Tensor
    log_prob: Tensor
    advantage: Tensor
    reward: Tensor
    held_out: Tensor
    diversity: float


def within_window(law: Law, high: float, low: float) -> Law:
    """A law for the steps between two times, and Euler's method outside."""

    def windowed(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside = (t <= high) & (s >= low)
        a, b, std = law(t, s)
        return torch.where(inside, a, 1.0), torch.where(inside, b, s - t), torch.where(inside, std, 0.0)

    return windowed


class FlowGRPO(Method):
    """Roles: the student, which is the policy; a frozen reference with its first weights."""

    def __init__(self, config: FlowGRPOConfig, pipeline: Pipeline) -> None:
        if not 0 <= config.window < config.steps:
            raise ValueError(f"window must be fewer than the {config.steps} steps, got {config.window}")
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True), "reference": Role(twin(pipeline), trained=False)}

    @cached_property
    def goal(self) -> Goal:
        """The rewards, read when they are first needed."""
        return self.config.goal.build()

    def turns(self, step: int) -> Sequence[Turn]:
        return [("student",)] * self.config.updates

    @torch.no_grad()
    def experience(self, loader: Loader, step: int) -> list[Batch]:
        asked = next(loader)
        prompts, ids = grouped(asked, self.config.group)
        noise = self._noise(asked)
        parts = torch.arange(len(prompts), device=noise.device).split(self.config.rows)
        walks = [self._walk(noise[part], [prompts[i] for i in part.tolist()], step) for part in parts]
        images = torch.cat([self.student.codec.decode(walk[-1].x).float() for walk in walks])
        reward, held_out = self.goal.score(images, prompts), self.goal.watch(images, prompts)
        advantage, spread, law = advantages(reward, prompts), diversity(images, prompts), self._law(step)
        batches: list[Batch] = []
        for part, walk in zip(parts, walks, strict=True):
            who = [prompts[i] for i in part.tolist()], [ids[i] for i in part.tolist()]
            came: dict[str, Any] = {"advantage": advantage[part], "reward": reward[part], "held_out": held_out[part], "diversity": spread}
            for move in walk:
                mean, std = transition(move.start, move.v, move.start_t, move.t, law)
                if std.any():
                    density = log_prob(move.x, mean, std)
                    batches.append(Transition(move.start, *who, after=move.x, t=move.start_t, s=move.t, log_prob=density, **came))
        return batches

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        assert isinstance(batch, Transition)
        law, reference = self._law(step), self.pipeline("reference")
        mean, std = transition(batch.images, self._denoise(self.student, batch.prompts)(batch.images, batch.t), batch.t, batch.s, law)
        with torch.no_grad():
            v_ref = self._denoise(reference, batch.prompts)(batch.images, batch.t)
            mean_ref, _ = transition(batch.images, v_ref, batch.t, batch.s, law)
        ratio = (log_prob(batch.after, mean, std) - batch.log_prob).exp()
        divergence = kl(mean, mean_ref, std)
        loss = policy_loss(ratio, batch.advantage, divergence, self.config)
        return loss.mean(), {"t": batch.t, **_rewards(batch), **told(ratio, batch.advantage, divergence, self.config)}

    def _noise(self, asked: Batch) -> Tensor:
        """What the roll-outs start from, group by group."""
        size, group = (asked.images.shape[-2], asked.images.shape[-1]), self.config.group
        drawn = len(asked) if self.config.shared else len(asked) * group
        noise = randn_like(asked.images.new_empty(drawn, *self.student.codec.latent_shape(size)), None)
        return noise.repeat_interleave(group, dim=0) if self.config.shared else noise

    def _walk(self, noise: Tensor, prompts: list[str], step: int) -> list[Step]:
        """The steps of a roll-out from noise to latents."""
        times = self._times()
        return list(flow_sde(self._denoise(self.student, prompts), self.student.entered(noise, times), times, law=self._law(step)))

    def _denoise(self, pipeline: Pipeline, prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
        settings = pipeline.config.sampling
        return pipeline.guided(pipeline.encode(prompts), settings.guidance, interval=settings.interval, rule=settings.rule)

    def _times(self) -> Tensor:
        return self.student.times(self.student.config.sampling.replace(steps=self.config.steps))

    def _law(self, step: int) -> Law:
        """The law of the roll-outs of a step of training."""
        law = LAWS[self.config.law](self.config.level)
        places = self.config.steps - self.config.window  # the last step has no noise
        if not self.config.window:
            return law
        if self.config.slide:
            first = step // self.config.slide % places
        else:
            first = random.Random(f"window-{step}").randrange(max(1, min(places, self.config.steps // 2 - self.config.window + 1)))
        times = self._times()
        return within_window(law, float(times[first]), float(times[first + self.config.window]))


def _rewards(batch: Transition) -> dict[str, Tensor]:
    """What tells a run that learns from one that deceives its reward. Rewards are means over the pictures that have one."""
    return {
        "reward": batch.reward.nanmean().nan_to_num(),
        "held_out_reward": batch.held_out.nanmean().nan_to_num(),
        "failed": batch.reward.isnan().float(),
        "diversity": torch.full((), batch.diversity),
    }
