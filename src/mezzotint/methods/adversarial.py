"""What adversarial distillation is made of: the critic's heads on frozen features, its losses, and the student's jumps.

`ladd` has it in latents, with the features of the teacher; `add` in pixels, with those of a vision encoder. A critic has to know something
before a student follows it, and to keep up with it: it learns `alone` for so many steps first, and `critic_rate` times as fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import from_velocity, interpolate
from mezzotint.flow.time import places
from mezzotint.methods.method import Turn
from mezzotint.pipeline import Pipeline

HIDDEN = 64  # width of the heads
EPS = 1e-5  # of their normalisation


class Head(nn.Module):
    """Tokens of one block (B, N, D) with a condition (B, HIDDEN) -> logits and slopes (B, N), see `Heads`."""

    def __init__(self, inner: nn.Linear, outer: nn.Linear) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, tokens: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        z = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        h = self.inner(z) + condition[:, None]
        rate = h.sigmoid() * (1 + h * (1 - h.sigmoid()))  # of silu
        by_z = (self.outer.weight * rate) @ self.inner.weight
        by_tokens = by_z - by_z.mean(-1, keepdim=True) - z * (by_z * z).mean(-1, keepdim=True)
        return self.outer(F.silu(h))[..., 0], by_tokens.square().sum(-1)


class Heads(nn.Module):
    """Tokens of frozen blocks, list of (B, N, D), with a condition (B, HIDDEN) -> logits and slopes, each (B, tokens of all blocks),
    in float32 or better.

    widths: D of every block. Each logit sees its own token only; its slope is the square of its gradient by that token in units of the
    token's standard deviation, which differs a hundredfold between blocks. The mean of slopes is the penalty R1 (Mescheder et al. 2018,
    eq. 9). It is in closed form, since a gradient of a gradient does not pass through a module that is sharded over ranks.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        inner, outer = [nn.Linear(width, HIDDEN) for width in widths], [nn.Linear(HIDDEN, 1) for _ in widths]
        self.heads = nn.ModuleList(map(Head, inner, outer))

    def forward(self, features: list[Tensor], condition: Tensor) -> tuple[Tensor, Tensor]:
        read = [head(tokens, condition) for head, tokens in zip(self.heads, features, strict=True)]
        logits, slopes = (torch.cat(parts, dim=1) for parts in zip(*read, strict=True))
        wide = torch.promote_types(logits.dtype, torch.float32)  # under autocast they are narrower
        return logits.to(wide), slopes.to(wide)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(B,) the critic's loss from logits (B, N) of real and of fake samples; zero where they are beyond 1 and -1."""
    return F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """(B,) share of logits (B, N) with the right sign: at 0.5 the critic knows nothing, at 1 it teaches nothing."""
    return ((real > 0).float().mean(1) + (fake < 0).float().mean(1)) / 2


def turns(step: int, alone: int) -> list[Turn]:
    """Critic and student in turn, after so many steps of the critic alone."""
    return [("critic",)] if step < alone else [("critic",), ("student",)]


def jumped(student: Pipeline, x0: Tensor, prompts: list[str], steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """One jump of the student to data, from x0 (B, ...) noised to one of its `steps` times, and these times (B,)."""
    times = student.config.path.times(steps, shift).to(x0.device, non_blocking=True)
    t = times[places(len(x0), steps)]
    x_t = interpolate(x0, torch.randn_like(x0), t)
    return from_velocity(student.velocity(x_t, t, student.encode(prompts)), "data", x_t, t), t
