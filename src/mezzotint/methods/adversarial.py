"""What adversarial distillation is made of: the critic's heads on frozen features, its losses, and the student's jumps.

`ladd` has it in latents, with the features of the teacher; `add` in pixels, with those of a vision encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import from_velocity, interpolate
from mezzotint.pipeline import Pipeline

HIDDEN = 64  # width of the heads


class Heads(nn.Module):
    """Tokens of frozen blocks, list of (B, N, D), with a condition (B, HIDDEN) -> logits (B, tokens of all blocks).

    widths: D of every block. Each logit sees its own token only.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, HIDDEN) for width in widths)
        self.outer = nn.ModuleList(nn.Linear(HIDDEN, 1) for _ in widths)

    def forward(self, features: list[Tensor], condition: Tensor) -> Tensor:
        c = condition[:, None]
        heads = zip(self.inner, self.outer, features, strict=True)
        return torch.cat([outer(F.silu(inner(F.layer_norm(f, f.shape[-1:])) + c))[..., 0] for inner, outer, f in heads], dim=1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(B,) the critic's loss from logits (B, N) of real and of fake samples; zero where they are beyond 1 and -1."""
    return F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)


def gradient_penalty(logits: Tensor, features: list[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018, eq. 9): (B,) squared gradients of logits (B, N) by the tokens that they see, averaged over logits."""
    gradients = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0) / logits.shape[1]


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """(B,) share of logits (B, N) with the right sign: at 0.5 the critic knows nothing, at 1 it teaches nothing."""
    return ((real > 0).float().mean(1) + (fake < 0).float().mean(1)) / 2


def started(features: list[Tensor]) -> list[Tensor]:
    """Features without their past, from which gradients start."""
    return [f.detach().requires_grad_() for f in features]


def jumped(student: Pipeline, x0: Tensor, prompts: list[str], steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """One jump of the student to data, from x0 (B, ...) noised to one of its `steps` times, and these times (B,)."""
    times = student.config.path.times(steps, shift)
    t = times[torch.randperm(len(x0)) % steps]
    x_t = interpolate(x0, torch.randn_like(x0), t)
    return from_velocity(student.velocity(x_t, t, student.encode(prompts)), "data", x_t, t), t
