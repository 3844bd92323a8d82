"""Direct preference optimisation of a flow (Wallace et al. 2023, eq. 14, in velocity form as in Liu et al. 2025).

    d = ||v - u||^2 - ||v_ref - u||^2,  u = eps - x0;    L = -log sigmoid(-beta / 2 (d_w - d_l)) + anchor ||v_w - u_w||^2

Winner w and loser l share noise and time, and so do student and reference. Errors are means over elements, so beta does
not depend on the size of the pictures. DPO alone often raises the errors of winner and loser both; the second term, the
flow-matching loss of the winner, holds the winner where it is. The first term is exactly ln 2 at the first step.

Pairs come with the data, or, with `draws`, from the student itself (online DPO): of so many pictures of a prompt the one with the highest
reward and the one with the lowest. Pairs of identical pictures, and drawn ones of equal rewards, teach nothing and are counted.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.data.batch import Batch, Loader
from mezzotint.errors import UserError
from mezzotint.evals.distance import diversity
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import flow_error
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn, twin
from mezzotint.pipeline import Pipeline
from mezzotint.rewards.goal import Goal, GoalConfig
from mezzotint.rewards.pairs import identical


@dataclass
class DPOConfig(MethodConfig, kind="dpo"):
    """beta: how sharply the student may leave the reference. anchor: weight of the winner's own loss.

    draws: pictures that the student draws of each prompt, in `steps` steps, to make pairs by `goal`; 0: the data's own pairs.
    """

    beta: float = 200.0
    anchor: float = 0.0
    draws: int = 0
    steps: int = 10
    goal: GoalConfig = field(default_factory=GoalConfig)
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "DPO":
        return DPO(self, pipeline)


def dpo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """(B,) losses from the (B,) errors of student and reference on winners and losers."""
    advantage = (winner - winner_ref) - (loser - loser_ref)
    return -F.logsigmoid(-beta / 2 * advantage)


@dataclass(kw_only=True)
class Drawn(Batch):
    """Pairs that the student drew. reward, held_out: (B, draws) of all pictures; a reward that failed is NaN. diversity: of these, see
    `evals.distance`."""

    reward: Tensor
    held_out: Tensor
    diversity: float


class DPO(Method):
    """Roles: the student, and a frozen reference with its first weights."""

    def __init__(self, config: DPOConfig, pipeline: Pipeline) -> None:
        if config.draws == 1 or config.draws < 0:
            raise ValueError(f"draws must be 0 or at least 2 pictures, got {config.draws}")
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True), "reference": Role(twin(pipeline), trained=False)}

    def experience(self, loader: Loader, step: int) -> list[Batch]:
        batch = next(loader)
        return [self._drawn(batch) if self.config.draws else batch]

    @cached_property
    def goal(self) -> Goal:
        """The rewards, read when they are first needed."""
        return self.config.goal.build()

    def _drawn(self, batch: Batch) -> Drawn:
        """The best and the worst of the student's pictures of each prompt; twice the best where all are alike."""
        n, draws = len(batch), self.config.draws
        seeds = torch.randint(1 << 62, (n * draws,)).tolist()
        images = self.student(batch.prompts, draws, seed=seeds, steps=self.config.steps).to(batch.images)
        prompts = [prompt for prompt in batch.prompts for _ in range(draws)]
        reward, held_out = (rate(images, prompts).view(n, draws) for rate in (self.goal.score, self.goal.watch))
        best, worst = reward.nan_to_num(-math.inf).max(1), reward.nan_to_num(math.inf).min(1)
        rows = torch.arange(n, device=reward.device)
        loser = torch.where(best.values > worst.values, worst.indices, best.indices)
        pictures = images.unflatten(0, (n, draws))
        ids = [f"{name} drawn with seeds {seeds[row * draws : (row + 1) * draws]}" for row, name in enumerate(batch.ids)]
        winners, losers = pictures[rows, best.indices], pictures[rows, loser]
        spread = diversity(images, prompts)
        return Drawn(winners, batch.prompts, ids, losers, reward=reward, held_out=held_out, diversity=spread)

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        if batch.rejected is None:
            raise UserError("DPO needs preference pairs, and this data has none")
        n = len(batch)
        winners, losers = self._latents(batch, batch.rejected)
        t, eps = self.config.times.sample(n), torch.randn_like(winners)
        x0 = torch.cat([winners, losers])
        both_t, both_eps = torch.cat([t, t]), torch.cat([eps, eps])
        reference = self.pipeline("reference")
        with torch.no_grad():
            winner_ref, loser_ref = self._errors(reference, batch.prompts, x0, both_eps, both_t)
        winner, loser = self._errors(self.student, batch.prompts, x0, both_eps, both_t)
        loss = dpo_loss(winner, loser, winner_ref, loser_ref, self.config.beta)
        right, pair = (winner - winner_ref < loser - loser_ref).float(), (~identical(batch.images, batch.rejected)).float()
        metrics = {
            "t": t,
            "preference": loss.detach(),
            "accuracy": right,
            "winner": winner.detach(),
            "loser": loser.detach(),
            "ties": 1 - pair,
        }
        if isinstance(batch, Drawn):
            metrics |= {"reward": batch.reward.nanmean().nan_to_num(), "held_out_reward": batch.held_out.nanmean().nan_to_num()}
            metrics |= {"failed": batch.reward.isnan().float(), "diversity": torch.full((), batch.diversity)}
        return (pair * (loss + self.config.anchor * winner)).mean(), metrics

    def _latents(self, batch: Batch, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Where the flows of winners and of losers end."""
        codec = self.student.codec
        if isinstance(batch, Drawn):
            return codec.pixels.encode(batch.images), codec.pixels.encode(rejected)
        return batch.x0(self.student), codec.encode(rejected)

    def _errors(self, pipeline: Pipeline, prompts: list[str], x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """(B,) errors on winners and on losers, in one pass."""
        cond = pipeline.encode(prompts)
        return flow_error(pipeline, x0, eps, t, type(cond).cat([cond, cond])).chunk(2)
