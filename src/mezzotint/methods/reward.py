"""A reward model from preference pairs (Bradley & Terry 1952; for pictures: Xu et al. 2023, ImageReward, eq. 1).

    L = E -log sigmoid(r(x_w, c) - r(x_l, c))

ln 2 where both are rated alike. Pairs are split by prompt and not by pair: a prompt is in training for ever or never, so that the
held-out accuracy is one on prompts that the model has not seen. Pairs of identical pictures teach nothing; they are left out and counted.

Where we differ: which prompts are held out is a function of their words, so no list of them is kept, and the same ones are held out
from every set of pairs. The mean is over all pairs, divided by the share that is taught in the long run and not in this batch: so every
pair counts alike, however a batch is cut into micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.errors import UserError
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.pipeline import Pipeline
from mezzotint.rewards.model import RewardModel, RewardModelConfig
from mezzotint.rewards.pairs import FOLDS, held_out, identical


@dataclass
class BradleyTerryConfig(MethodConfig, kind="bradley_terry"):
    """model: what is trained. folds: one prompt in so many is held out."""

    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    folds: int = FOLDS

    def build(self, pipeline: Pipeline) -> "BradleyTerry":
        return BradleyTerry(self, pipeline)


def bradley_terry_loss(winner: Tensor, loser: Tensor) -> Tensor:
    """(B,) losses from the (B,) rewards of winners and losers."""
    return -F.logsigmoid(winner - loser)


class BradleyTerry(Method):
    """Roles: the reward model; a student that stays as it is, the pipeline to be trained with the reward later."""

    def __init__(self, config: BradleyTerryConfig, pipeline: Pipeline) -> None:
        self.config = config
        self.share = 1 - 1 / config.folds if config.folds > 1 else 1.0  # of pairs that are taught, in the long run
        self.roles = {"student": Role(pipeline, trained=False), "reward": Role(config.model.build(), averaged=True)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [("reward",)]

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        if batch.rejected is None:
            raise UserError("a reward model needs preference pairs, and this data has none")
        model = self.roles["reward"].module
        assert isinstance(model, RewardModel)
        winner, loser = model(torch.cat([batch.images, batch.rejected]), batch.prompts * 2).chunk(2)
        tie = identical(batch.images, batch.rejected)
        held = torch.tensor([held_out(prompt, self.config.folds) for prompt in batch.prompts], device="cpu")
        held = held.to(tie.device, non_blocking=True)
        taught = (~held & ~tie).float()
        loss = (bradley_terry_loss(winner, loser) * taught).mean() / self.share
        right, unseen = (winner > loser).float(), (held & ~tie).float()
        metrics = {"accuracy": right, "margin": (winner - loser).detach(), "ties": tie.float()}
        # Shares of all pairs: their quotient is the held-out accuracy, also where a batch has no such pair.
        return loss, metrics | {"held_out": unseen, "held_out_right": unseen * right}
