"""Optimizers, the schedule of their learning rate, and moving averages of weights."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mezzotint import config
from mezzotint.train.parallel import share_like, whole


@dataclass
class OptimConfig(config.Config, kind="optim"):
    """name: "muon" steps the matrices of transformer blocks by Muon and all else by AdamW; "adamw" all by AdamW.

    lr: the peak. warmup: steps from 0 to it. decay: after warm-up the rate falls to zero at the last step in a straight
    line or a half cosine, or stays constant. clip: largest norm of a role's gradient. average: decay of the moving average.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 1.0
    average: float = 0.999

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        left = 1 - (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[self.decay]

    def build(self, module: nn.Module) -> list[Optimizer]:
        """The optimizers of a module's trainable parameters: each parameter in exactly one of them."""
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        # Embeddings, patch, modulation and output layers and all vectors are no maps between hidden states of tokens.
        hidden = [p for name, p in named if self.name == "muon" and p.ndim == 2 and re.search(r"blocks\.\d+\.(attention|mlp)\.", name)]
        rest = [p for _, p in named if all(p is not h for h in hidden)]
        optimizers: list[Optimizer] = []
        if hidden:
            optimizers.append(Muon(hidden, lr=self.lr, weight_decay=self.weight_decay))
        if rest:
            optimizers.append(AdamW(rest, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True))
        return optimizers


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Matrices (..., m, n) with their singular values brought near one, by a quintic Newton-Schulz iteration.

    Jordan et al. 2024: the coefficients trade exactness (values end in about [0.7, 1.2]) for a steep slope at zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(Optimizer):
    """Momentum orthogonalised (Jordan et al. 2024), its step scaled to AdamW's typical size (Liu et al. 2025, eq. 4).

    For matrices only. torch.optim.Muon iterates in bfloat16 whatever the device, which on CPUs without bfloat16 units is
    many times slower than the whole training step; here the iteration runs in float32 on the CPU and in bfloat16
    elsewhere, and matrices of one shape go through it together. Of a matrix that ranks share, each iterates the whole.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in by_shape.items():
                self._step(matrices, 0.2 * max(shape) ** 0.5, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, matrices: list[nn.Parameter], scale: float, lr: float, momentum: float, decay: float) -> None:
        updates = []
        for p in matrices:
            assert p.grad is not None
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(buffer, momentum))
        stacked = torch.stack([whole(update) for update in updates])
        directions = orthogonalise(stacked if stacked.device.type == "cpu" else stacked.bfloat16()).to(stacked)
        for p, direction in zip(matrices, directions, strict=True):
            p.mul_(1 - lr * decay).sub_(share_like(direction, p), alpha=lr * scale)


def clip_(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scale gradients down to a norm of at most `largest`; returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, largest)


@torch.no_grad()
def average_(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the module, faster in the first steps: decay is at most (1 + step) / (10 + step).

    Buffers are copied.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), weight)
    for mine, other in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(other)
