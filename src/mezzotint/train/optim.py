"""Optimizers, the schedule of their learning rate, and the norm of gradients."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mezzotint import config
from mezzotint.errors import UserError
from mezzotint.train.adamw8 import AdamW8, block_size
from mezzotint.train.parallel import share_like, whole


@dataclass
class OptimConfig(config.Config, kind="optim"):
    """name: "adamw" steps all by AdamW; "adamw8" keeps its states in 8 bits (`train.adamw8`), but for small parameters; "muon" steps the
    matrices of transformer blocks by Muon and all else by AdamW.

    lr: the peak. warmup: steps from 0 to it. decay: after warm-up the rate falls to zero at the last step in a straight line
    or a half cosine, or stays constant; "wsd" stays constant until the last `cooldown` of all steps, and falls there.
    clip: largest norm of a role's gradient. average: decay of the moving average. lengths: relative lengths of power-function
    averages instead (`train.average`); the first is the one that is seen. snapshot: steps from one stored state of these to the next.
    """

    name: Literal["adamw", "adamw8", "muon"] = "adamw"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    cooldown: float = 0.2
    clip: float = 1.0
    average: float = 0.999
    lengths: tuple[float, ...] = ()
    snapshot: int = 1000

    def check(self) -> None:
        """UserError for a number that no run can have."""
        if not 0 <= self.lr < math.inf:
            raise UserError(f"optim.lr must be at least 0 and finite, got {self.lr}")
        if not self.clip > 0:
            raise UserError(f"optim.clip must be above 0, got {self.clip}; inf clips nothing")
        if not 0 <= self.average < 1:
            raise UserError(f"optim.average must be at least 0 and below 1, got {self.average}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1.

        "wsd" is warm-up, stable, decay (Hu et al. 2024) with the decay 1 - sqrt (Haegele et al. 2024, section 4).
        """
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        start = max(self.warmup, steps * (1 - self.cooldown)) if self.decay == "wsd" else self.warmup
        done = max(0.0, (step - start) / max(1, steps - start))
        shapes = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "constant": 1.0, "wsd": 1 - math.sqrt(done)}
        return self.lr * shapes[self.decay]

    def build(self, module: nn.Module) -> list[Optimizer]:
        """The optimizers of a module's trainable parameters: each parameter in exactly one of them."""
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        # Embeddings, patch, modulation and output layers and all vectors are no maps between hidden states of tokens.
        hidden = [p for name, p in named if self.name == "muon" and p.ndim == 2 and re.search(r"blocks\.\d+\.(attention|mlp)\.", name)]
        coded = [p for _, p in named if self.name == "adamw8" and block_size(p.shape)]
        taken = {id(p) for p in hidden + coded}
        rest = [p for _, p in named if id(p) not in taken]
        optimizers: list[Optimizer] = []
        if hidden:
            optimizers.append(Muon(hidden, lr=self.lr, weight_decay=self.weight_decay))
        if coded:
            optimizers.append(AdamW8(coded, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay))
        if rest:
            optimizers.append(AdamW(rest, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True))
        return optimizers


def step_(optimizer: Optimizer, rate: float, held: Tensor) -> None:
    """One step at a rate; where `held` () is one instead of zero, weights and state stay as they are. The host does not wait to know.

    This is how `torch.amp.GradScaler` tells an optimizer that a gradient overflowed, without the scaling.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf, optimizer.grad_scale = held, None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


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
    elsewhere, and matrices of one shape go through it together. Of a matrix that ranks share, each iterates the whole. It knows
    `found_inf` as torch's fused optimizers do (`step_`).
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

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
        held = torch.zeros((), dtype=torch.bool) if self.found_inf is None else self.found_inf > 0
        updates = []
        for p in matrices:
            assert p.grad is not None
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            moved = buffer.lerp(p.grad, 1 - momentum)
            updates.append(whole(p.grad.lerp(moved, momentum)))
            buffer.copy_(torch.where(held, buffer, moved))
        stacked = torch.stack(updates)
        directions = orthogonalise(stacked if stacked.device.type == "cpu" else stacked.bfloat16()).to(stacked).masked_fill(held, 0)
        shrink = torch.where(held, 1, 1 - lr * decay)
        for p, direction in zip(matrices, directions, strict=True):
            p.mul_(shrink).sub_(share_like(direction, p), alpha=lr * scale)


@dataclass(frozen=True)
class Norms:
    """Norms of the gradients of P parameters. total: (), of all together. each: those of the parameters number `owners`, which have one."""

    total: Tensor
    each: Tensor
    owners: list[int]

    def by(self, names: Sequence[str]) -> dict[str, float]:
        """The norms of groups of parameters, which `names` (P) says. Waits for the device."""
        squares: dict[str, float] = {}
        for owner, norm in zip(self.owners, self.each.tolist(), strict=True):
            squares[names[owner]] = squares.get(names[owner], 0.0) + norm**2
        return {name: math.sqrt(square) for name, square in squares.items()}


def clip_(parameters: Sequence[Tensor], largest: float) -> Norms:
    """Scale gradients down to a norm of at most `largest` together; returns the norms before."""
    owners = [number for number, p in enumerate(parameters) if p.grad is not None]
    grads = [p.grad for p in parameters if p.grad is not None]
    each = torch.stack(torch._foreach_norm(grads, 2, torch.float32))
    if hasattr(each, "full_tensor"):  # of sharded parameters
        each = each.full_tensor()
    total = torch.linalg.vector_norm(each)
    torch._foreach_mul_(grads, (largest / (total + 1e-6)).clamp_max(1.0))
    return Norms(total, each, owners)


def block(name: str) -> str:
    """The block of a network that a parameter belongs to: its name up to the first number, or else its first two words."""
    words = name.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdecimal()]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:2])
