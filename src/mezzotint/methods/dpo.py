"""Direct preference optimisation of a flow (Wallace et al. 2023, eq. 14, in velocity form as in Liu et al. 2025).

    d = ||v - u||^2 - ||v_ref - u||^2,  u = eps - x0;    L = -log sigmoid(-beta / 2 (d_w - d_l)) + anchor ||v_w - u_w||^2

Winner w and loser l share noise and time, and so do student and reference. Errors are means over elements, so beta does
not depend on the size of the pictures. DPO alone often raises the errors of winner and loser both; the second term, the
flow-matching loss of the winner, holds the winner where it is. The first term is exactly ln 2 at the first step.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.errors import UserError
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import flow_error
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.pipeline import Pipeline


@dataclass
class DPOConfig(MethodConfig, kind="dpo"):
    """beta: how sharply the student may leave the reference. anchor: weight of the winner's own loss."""

    beta: float = 200.0
    anchor: float = 0.0
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "DPO":
        return DPO(self, pipeline)


def dpo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """(B,) losses from the (B,) errors of student and reference on winners and losers."""
    advantage = (winner - winner_ref) - (loser - loser_ref)
    return -F.logsigmoid(-beta / 2 * advantage)


class DPO(Method):
    """Roles: the student, and a frozen reference with its first weights."""

    def __init__(self, config: DPOConfig, pipeline: Pipeline) -> None:
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True), "reference": Role(copy.deepcopy(pipeline), trained=False)}

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        if batch.rejected is None:
            raise UserError("DPO needs preference pairs, and this data has none")
        n = len(batch)
        t, eps = self.config.times.sample(n), torch.randn_like(self.student.codec.encode(batch.images))
        x0 = torch.cat([self.student.codec.encode(batch.images), self.student.codec.encode(batch.rejected)])
        both_t, both_eps = torch.cat([t, t]), torch.cat([eps, eps])
        reference = self.roles["reference"].module
        assert isinstance(reference, Pipeline)
        with torch.no_grad():
            winner_ref, loser_ref = self._errors(reference, batch.prompts, x0, both_eps, both_t)
        winner, loser = self._errors(self.student, batch.prompts, x0, both_eps, both_t)
        loss = dpo_loss(winner, loser, winner_ref, loser_ref, self.config.beta)
        right = (winner - winner_ref < loser - loser_ref).float()
        metrics = {"t": t, "preference": loss.detach(), "accuracy": right, "winner": winner.detach(), "loser": loser.detach()}
        return (loss + self.config.anchor * winner).mean(), metrics

    def _errors(self, pipeline: Pipeline, prompts: list[str], x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """(B,) errors on winners and on losers, in one pass."""
        cond = pipeline.encode(prompts)
        return flow_error(pipeline, x0, eps, t, type(cond).cat([cond, cond])).chunk(2)
