"""Reflow and one-step distillation of its pairs (Liu et al. 2022, algorithm 1; InstaFlow, Liu et al. 2024, algorithms 1 and 2).

On pairs of noise eps and what the flow of a teacher carries it to, x0' = ODE(eps, c), guided by a fixed scale:

    L = E_t || v(x_t, t, c) - (eps - x0') ||^2,    x_t = (1 - t) x0' + t eps

It is flow matching whose noise and data belong together. That makes paths straighter (`flow.solvers.straightness`), so that few Euler
steps do, and guidance is folded in. The pairs are data (`data.pairs`): who mixes them with others, or shuffles their noise, bends the
paths again. A second reflow starts from pairs that the first student drew.

A student of one step sees t = 1 only, where the loss is that of its sample eps - v: with `ones` = 1 this is InstaFlow's distillation.
`perceptual` adds the distance of features, where they take LPIPS of decoded pictures: ours are those of the blocks of the student as it
starts, frozen, which need no other network and no decoding (Lin & Yang 2024), normalised and compared as in LPIPS (Zhang et al.
2018, eq. 1), at noise of time `SEEN`, shared by both.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.errors import UserError
from mezzotint.flow.domain import within
from mezzotint.flow.path import from_velocity, interpolate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import levelled
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn, twin
from mezzotint.methods.teacher import block_features
from mezzotint.pipeline import Pipeline

SEEN = 0.1


@dataclass
class ReflowConfig(MethodConfig, kind="reflow"):
    """ones: share of the batch at pure noise, where a student of few steps errs most. perceptual: weight of the distance of features; 0
    keeps no frozen network. level: of the loss, see `methods.denoise`. times: of the rest of the batch.
    """

    ones: float = 0.1
    perceptual: float = 0.0
    level: float = 0.0
    times: TimeDensity = field(default_factory=lambda: TimeDensity(uniform=1.0))

    def build(self, pipeline: Pipeline) -> "Reflow":
        return Reflow(self, pipeline)


class Reflow(Method):
    """Roles: the student; where features are compared, the frozen network that has them."""

    def __init__(self, config: ReflowConfig, pipeline: Pipeline) -> None:
        within(0, 1, ones=config.ones)
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True)}
        if config.perceptual:
            self.roles["features"] = Role(twin(pipeline), trained=False)

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        x0, eps = self._pairs(batch)
        t = self.config.times.sample(len(batch))
        t = torch.where(torch.rand(len(batch)) < self.config.ones, 1.0, t)
        x_t = interpolate(x0, eps, t)
        velocity = self.student.velocity(x_t, t, self.student.encode(batch.prompts))
        error = (velocity - (eps - x0)).square().flatten(1).mean(1)
        loss = levelled(t, self.config.level) * error
        metrics: dict[str, Tensor] = {"t": t, "loss": error.detach()}
        if self.config.perceptual:
            distance = self._distance(from_velocity(velocity, "data", x_t, t), x0, batch.prompts)
            loss = loss + self.config.perceptual * distance
            metrics["perceptual"] = distance.detach()
        return loss.mean(), metrics

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents and their noise. UserError where the data has none, or latents of another form than the student's."""
        if batch.latents is None or batch.noise is None:
            raise UserError("reflow needs pairs of noise and samples, and this data has none; take data of kind pairs (recipe tiny.reflow)")
        channels = self.student.codec.channels
        if batch.latents.shape[1] != channels:
            raise UserError(
                f"the pairs' latents have {batch.latents.shape[1]} channels and the student's {channels}; start from the pairs' teacher"
            )
        return batch.latents, batch.noise

    def _distance(self, x: Tensor, y: Tensor, prompts: list[str]) -> Tensor:
        """(B,) squared distance of normalised features of x and y, averaged over tokens and blocks; gradients go to x."""
        features = self.pipeline("features")
        eps, t = torch.randn_like(x), torch.full((len(x),), SEEN)
        with torch.no_grad():
            cond = features.encode(prompts)
            theirs = block_features(features, interpolate(y, eps, t), t, cond)
        ours = block_features(features, interpolate(x, eps, t), t, cond)
        pairs = zip(ours, theirs, strict=True)
        distances = [(F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean(1) for a, b in pairs]
        return torch.stack(distances).mean(0)
