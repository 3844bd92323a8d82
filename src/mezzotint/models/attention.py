"""Multi-head attention with normalised queries and keys, rotary positions and a mask over keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.embed import rotate


class Attention(nn.Module):
    """Attention of (B, N, D) to itself and to a context (B, L, D), which is attended to but does not attend.

    Queries and keys are normalised per head before rotation, by a LayerNorm without bias (Dehghani et al. 2023), which keeps
    the logits bounded at any learning rate. No layer has a bias: on CPUs the gradient of one costs as much as a norm.
    rotation: of context and x in this order, see `embed.rope`. mask: (B, L + N) bool, True for keys that may be attended.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.norm_q = nn.LayerNorm(dim // heads, eps=1e-6, bias=False)
        self.norm_k = nn.LayerNorm(dim // heads, eps=1e-6, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        keys = x if context is None else torch.cat([context, x], dim=1)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k, v = self.kv(keys).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L + N, d)
        q, k = rotate(self.norm_q(q), rotation[-x.shape[1] :]), rotate(self.norm_k(k), rotation)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out
