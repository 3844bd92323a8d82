"""Multi-head attention: to itself, to a context, to a text, of two streams together; by softmax or linear.

B batch, N tokens that ask, K tokens that are asked, D width, d channels of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.embed import rotate

QKNorm = Literal["head", "width"]
Softmax = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # as `softmax`


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The kernel of `attend`, with its arguments -> (B, heads, N, d)."""
    keys = None if mask is None else mask.reshape(len(mask), 1, -1, k.shape[2])
    if q.is_cuda:  # where no fused kernel that takes a mask, or float32, has key heads that queries share
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] < q.shape[1] else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, enable_gqa=q.shape[1] != k.shape[1])


_kernel: Softmax = softmax


@contextmanager
def attending(kernel: Softmax) -> Iterator[None]:
    """Within, `attend` asks another kernel: one that knows of tokens elsewhere."""
    # A plain global, since compilers of blocks cannot read context variables.
    global _kernel
    before, _kernel = _kernel, kernel
    try:
        yield
    finally:
        _kernel = before


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q (B, heads, N, d), k and v (B, kv heads, K, d) -> (B, N, heads d).

    With fewer key heads than query heads, neighbouring query heads share one (Ainslie et al. 2023). mask: (B, K) bool, True for
    keys that may be attended, or (B, N, K) where each query has its own; where there is none, the answer is zero.
    """
    return _kernel(q, k, v, mask).transpose(1, 2).flatten(2)


def attend_linearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the kernel relu(q) . relu(k) instead of exp(q . k) (Katharopoulos et al. 2020).

    q, k and v (B, heads, N, d) -> (B, N, heads d) float32. The sum over keys is a matrix d x d for all queries, computed once, in
    float32.
    """
    q, k, v = q.float(), k.float(), v.float()
    q, k, v = F.relu(q), F.relu(k), F.pad(v, (0, 1), value=1.0)  # a column of ones sums the weights
    summed = q @ (k.mT @ v)
    attended = summed[..., :-1] / (summed[..., -1:] + 1e-15)
    return attended.transpose(1, 2).flatten(2)


def with_image(mask: Tensor | None, image: Tensor) -> Tensor | None:
    """The mask over keys [text, image] from a text's (B, L) and image tokens (B, N, D), all of which may be attended."""
    return None if mask is None else torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)


class Attention(nn.Module):
    """Attention of (B, N, D) to itself and to a context (B, L, D), which is attended to but does not attend.

    Queries and keys are normalised per head before rotation, by a LayerNorm without bias (Dehghani et al. 2023), which keeps
    the logits bounded at any learning rate. No layer has a bias: on CPUs the gradient of one costs as much as a norm.
    rotation: of context and x in this order, as `embed.rotate` takes it. mask: (B, L + N) bool, True for keys that may be attended.
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
        q, k = rotate(self.norm_q(q), rotation[..., -x.shape[1] :, :, :]), rotate(self.norm_k(k), rotation)
        out: Tensor = self.out(attend(q, k, v, mask))
        return out


class QKV(nn.Module):
    """(B, N, D) -> queries (B, heads, N, d), keys and values (B, kv heads, N, d), by one matrix product.

    head: channels d of a head, D / heads unless told otherwise. norm: queries and keys RMS-normalised with a learned scale, per
    head or across all of them, or not at all.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head: int | None = None,
        bias: bool = True,
        norm: QKNorm | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if (dim % heads and head is None) or heads % kv_heads:
            raise ValueError(f"dim must be a multiple of heads and heads of kv_heads, got {dim}, {heads} and {kv_heads}")
        self.head = dim // heads if head is None else head
        self.widths = [heads * self.head, kv_heads * self.head, kv_heads * self.head]
        self.linear = nn.Linear(dim, sum(self.widths), bias=bias)
        self.norm_q, self.norm_k = (_qk_norm(norm, n, self.head, eps) for n in (heads, kv_heads))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (-1, self.head)) for part in self.linear(x).split(self.widths, dim=-1))
        return self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2)


def _qk_norm(norm: QKNorm | None, heads: int, head: int, eps: float) -> nn.Module:
    if norm is None:
        return nn.Identity()
    return nn.RMSNorm(head if norm == "head" else (heads, head), eps=eps)


class SelfAttention(nn.Module):
    """Attention of (B, N, D) to itself. Keywords as in `QKV`; without a bias there, the output has none either."""

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, bias: bool = True, norm: QKNorm | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.qkv = QKV(dim, heads, kv_heads=kv_heads, bias=bias, norm=norm, eps=eps)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, rotation: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out: Tensor = self.out(attend(q, k, v, mask))
        return out


class CrossAttention(nn.Module):
    """Attention of (B, N, D) to a text (B, L, D). norm: across all heads, or none."""

    def __init__(self, dim: int, heads: int, *, norm: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm_q, self.norm_k = (_qk_norm("width" if norm else None, heads, dim // heads, eps=1e-5) for _ in range(2))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.norm_q(self.q(x).unflatten(-1, (self.heads, -1)))
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        out: Tensor = self.out(attend(q.transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2), mask))
        return out


class PlainAttention(nn.Module):
    """Attention of (B, N, D) to itself or to a context (B, K, C), without norms and without biases but for the output's.

    As in Stable Diffusion (Rombach et al. 2022) and U-ViT (Bao et al. 2023). context: its width C, D unless told otherwise.
    """

    def __init__(self, dim: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim if context is None else context, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x if context is None else context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(attend(q, k, v, mask))
        return out
