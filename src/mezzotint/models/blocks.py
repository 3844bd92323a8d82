"""Transformer blocks and the pieces they share.

adaLN-zero (Peebles & Xie 2023): a block's shifts, scales and gates come from the condition through a layer that starts at
zero, so every block starts as the identity.
"""

import torch
from torch import Tensor, nn

from mezzotint.models.attention import Attention


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) scaled and shifted per sample; shift and scale are (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class MLP(nn.Sequential):
    """D -> ratio D -> D without biases, with a GELU, the exact one: on CPUs its tanh approximation takes twice as long."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__(nn.Linear(dim, ratio * dim, bias=False), nn.GELU(), nn.Linear(ratio * dim, dim, bias=False))


class Modulation(nn.Module):
    """(B, D) -> `chunks` tensors (B, D), all zero at first."""

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(dim, chunks * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(nn.functional.silu(c)).chunk(self.chunks, dim=-1)


class Block(nn.Module):
    """A pre-norm transformer block without conditions, as text encoders use it. It starts as the identity."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        for last in (self.attention.out, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotation, mask)
        x = x + self.mlp(self.norm_mlp(x))
        return x


class AdaBlock(nn.Module):
    """The DiT block: attention (to itself and a context) and MLP, each shifted, scaled and gated by the condition c (B, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, heads)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        attended = self.attention(modulate(self.norm(x), shift_a, scale_a), rotation, mask, context)
        x = torch.addcmul(x, gate_a[:, None], attended)
        x = torch.addcmul(x, gate_m[:, None], self.mlp(modulate(self.norm(x), shift_m, scale_m)))
        return x
