"""AdamW whose two states are kept in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

Every block of neighbours in a row has a scale s, the largest magnitude in it, in float32, and each number x of it a code c:

    c = sign(x) max(0, round(n (1 + log2(|x| / s) / OCTAVES))),    x ~ sign(c) s 2^(OCTAVES (|c| / n - 1)),

n = 127 for the first moment, and 255 for the second, which has no sign. A step decodes the states, makes AdamW's own update in float32,
and encodes what it got. Where we differ: codes are logarithmic, so that a number of any size has the same relative error (at most 5.6%
and 2.8%); it is the root of the second moment that is coded, since what the update divides by must not become zero; and blocks lie within
rows, so that the codes are the same for any number of ranks, which have rows. docs/LOG.md has what the published code does instead.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mezzotint.train.parallel import share_like

BLOCK, LEAST_BLOCK = 256, 64  # numbers that share a scale; with fewer, scales would take more than a sixteenth of what is saved
LEAST = 4096  # numbers of a parameter; all that are smaller are a small part of a model
OCTAVES = 20  # from the scale down to the smallest number that is not zero


def block_size(shape: torch.Size) -> int:
    """Numbers of a block: the largest divisor of a row's length up to BLOCK. 0 where states are better left in float32."""
    length = shape[1:].numel()
    if len(shape) < 2 or shape.numel() < LEAST:
        return 0
    size = next(n for n in range(min(BLOCK, length), 0, -1) if length % n == 0)
    return size if size >= LEAST_BLOCK else 0


def encode(x: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers (n, ...) as codes (n, ...) and scales (n, blocks of a row). dtype: int8, or uint8 for what has no sign."""
    most = torch.iinfo(dtype).max
    blocks = x.reshape(len(x), x.shape[1:].numel() // size, size)  # no rows are rows, too
    scales = torch.linalg.vector_norm(blocks, torch.inf, dim=-1)
    ratios = blocks / scales.clamp_min(torch.finfo(x.dtype).tiny)[..., None]
    codes = torch.add(most, ratios.abs().log2_(), alpha=most / OCTAVES).round_().clamp_min_(0)
    return codes.copysign_(blocks).to(dtype).view_as(x), scales


def decode(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    """The numbers (n, ...) that codes (n, ...) stand for."""
    blocks = levels(codes.dtype, codes.device)[codes.view(torch.uint8).int()].view(*scales.shape, size)
    return blocks.mul_(scales[..., None]).view(codes.shape)


@lru_cache
def levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,) what codes stand for in a block whose scale is one, in the order of their bits."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()
    return codes.sign() * torch.exp2(OCTAVES * (codes.abs() / torch.iinfo(dtype).max - 1))


class AdamW8(Optimizer):
    """For parameters that have a `block_size`; of those that ranks share, each steps its rows.

    A state has step (), exp_avg and exp_avg_sq_root of the parameter's shape, and the scales of both (n, blocks of a row). It knows
    `found_inf` as torch's fused optimizers do (`optim.step_`).
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state[p] or _fresh(p)
                    self._step(p, group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def _step(self, p: nn.Parameter, lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        assert p.grad is not None
        size, state, weights = block_size(p.shape), {name: _rows(x) for name, x in self.state[p].items()}, _rows(p)
        held = torch.zeros((), dtype=torch.bool, device=p.device) if self.found_inf is None else self.found_inf > 0
        g = _rows(p.grad).masked_fill(held, 0)  # it may not be finite
        steps = state["step"].add_(~held).clamp_min(1)  # a first step that is held leaves it at zero
        m = decode(state["exp_avg"], state["exp_avg_scale"], size).lerp_(g, 1 - betas[0])
        root = decode(state["exp_avg_sq_root"], state["exp_avg_sq_root_scale"], size)
        root.mul_(betas[1] ** 0.5).hypot_(g.mul_((1 - betas[1]) ** 0.5))
        for name, x in (("exp_avg", m), ("exp_avg_sq_root", root)):
            codes, scales = encode(x, size, state[name].dtype)
            state[name].copy_(torch.where(held, state[name], codes))
            state[f"{name}_scale"].copy_(torch.where(held, state[f"{name}_scale"], scales))
        rate, unbias = ~held * lr, (1 - betas[1] ** steps).sqrt()
        m.mul_(rate * unbias / (1 - betas[0] ** steps))
        weights.mul_(1 - rate * decay).addcdiv_(m, root.add_(eps * unbias), value=-1)


def _rows(tensor: Tensor) -> Tensor:
    """Those of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fresh(p: nn.Parameter) -> dict[str, Tensor]:
    """States of zeros."""
    scales = share_like(torch.zeros(p.shape[0], p.shape[1:].numel() // block_size(p.shape), device=p.device), p)
    return {
        "step": torch.zeros((), device=p.device),
        "exp_avg": torch.zeros_like(p, dtype=torch.int8),
        "exp_avg_scale": scales,
        "exp_avg_sq_root": torch.zeros_like(p, dtype=torch.uint8),
        "exp_avg_sq_root_scale": scales.clone(),
    }
