"""Flow matching (Lipman et al. 2022, eq. 9; Liu et al. 2022, eq. 1): pre-training, continued training and fine-tuning.

    L = E_{t, x0, eps} || v(x_t, t, c) - (eps - x0) ||^2

The loss is on the velocity whatever the network predicts. In terms of x0 that is a weight of 1 / t^2, which hands the
gradient to the least noisy samples, where there is the least to learn; below the time `level` the weight stays what it is there.

`detail` adds the squared differences of the error between neighbouring pixels. The conditional mean minimises every
positive definite quadratic form of the error, so this does not move the minimum. It changes the way there: power falls off with
frequency in pictures, so that the plain loss learns edges and corners last, and differences weigh them up.

`mask` leaves a share of the patches out of most of the network, chosen anew for every picture, and the loss is over the others alone
(MicroDiT, Sehwag et al. 2024, section 3): cheap pre-training, to be ended by some of the whole pictures. Neighbours of the detail term are
those within a patch there. Sampling and evaluation leave nothing out.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.errors import UserError
from mezzotint.flow.path import interpolate
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.models import Cond
from mezzotint.models.embed import chosen, patchify
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


def kept(share: float, rows: int, number: int) -> Tensor:
    """(rows, K) numbers, rising, of the patches out of `number` that stay when a share is left out; at least one does."""
    if not 0 <= share < 1:
        raise ValueError(f"mask must be within [0, 1), got {share}")
    return torch.rand(rows, number).argsort(1)[:, : max(1, round((1 - share) * number))].sort(1).values


def patches(x: Tensor, keep: Tensor, patch: int) -> Tensor:
    """Patches `keep` (B, K) of pictures x (B, C, H, W) or videos, as small pictures (B, K, C, p, p)."""
    tokens = chosen(patchify(x if x.ndim == 5 else x[:, :, None], patch), keep)
    return tokens.unflatten(-1, (patch, patch, -1)).permute(0, 1, 4, 2, 3)


@dataclass
class DenoiseConfig(MethodConfig, kind="denoise"):
    """drop: share of captions dropped, for guidance. level, detail, mask: see above; 0 is the plain loss. times: of training."""

    drop: float = 0.1
    level: float = 0.0
    detail: float = 0.0
    mask: float = 0.0
    times: TimeDensity = field(default_factory=TimeDensity)

    def build(self, pipeline: Pipeline) -> "Denoise":
        return Denoise(self, pipeline)


class Denoise(Method):
    """Roles: the student."""

    def __init__(self, config: DenoiseConfig, pipeline: Pipeline) -> None:
        self.config = config
        self.roles = {"student": Role(pipeline, averaged=True, dropout=True)}

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        x0 = batch.x0(self.student)
        cond = self.student.drop(batch.conditions(self.student), torch.rand(len(batch)) < self.config.drop)
        t = self.config.times.sample(len(batch))
        cond = replace(cond, keep=self._keep(x0)) if self.config.mask else cond
        difference = flow_difference(self.student, x0, torch.randn_like(x0), t, cond)
        if cond.keep is not None:
            difference = patches(difference, cond.keep, self.student.config.denoiser.patch)
        error = difference.square().flatten(1).mean(1)
        loss = error + self.config.detail * roughness(difference) if self.config.detail else error
        return (levelled(t, self.config.level) * loss).mean(), {"t": t, "loss": error.detach()}

    def _keep(self, x0: Tensor) -> Tensor:
        """Which patches of these latents stay. UserError for a network that cannot leave any out."""
        denoiser = self.student.config.denoiser
        if not denoiser.maskable:
            raise UserError(f"method.mask needs a dit or class_dit without overlap (its stride 0), and this is a {denoiser.kind}")
        frames, (rows, columns) = x0.shape[2:-2], denoiser.grid(*x0.shape[-2:])
        return kept(self.config.mask, len(x0), math.prod(frames) * rows * columns).to(x0.device)
