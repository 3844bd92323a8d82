"""Multi-head attention with normalised queries and keys, rotary positions and a mask over keys."""

import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.embed import rotate


class Attention(nn.Module):
    """Self-attention over (B, N, D).

    Queries and keys are RMS-normalised per head before rotation (Dehghani et al. 2023; Esser et al. 2024), which keeps the
    logits bounded at any learning rate. rotation: see `embed.rope`. mask: (B, N) bool, True for keys that may be attended.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        q, k = rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out
