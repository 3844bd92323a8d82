"""The pieces of a network as a paper's equations have them, for networks whose published code is no package: no fused kernel, no module.

A network of the paper's is a `Paper`: it has the weights of one of ours, by the same names, and computes with these.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.weights import Names, Rule

Weights = Mapping[str, Tensor]


class Paper(nn.Module):
    """Weights of the network that a configuration describes, to compute with."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.net = config.build()

    @property
    def weights(self) -> Weights:
        """Weights by our names."""
        return dict(self.net.named_parameters())


def same_names(config: Any) -> Names:
    """Our names to those of a `Paper`."""
    with torch.device("meta"):
        return Names([Rule(name, f"net.{name}") for name in config.build().state_dict()])


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """W x + b, or W x."""
    out = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"])
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """(x - mean) / deviation over channels, scaled and shifted."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    """x / sqrt(mean of x^2 over channels), scaled."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def group_norm(x: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    """(x - mean) / deviation over a group's channels and all places of a map (B, C, H, W), scaled and shifted by channel."""
    parts = x.unflatten(1, (groups, -1))
    centred = parts - parts.mean((2, 3, 4), keepdim=True)
    normal = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
    return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def convolved(x: Tensor, w: Weights, name: str, stride: int = 1) -> Tensor:
    """A convolution that keeps the size, as a sum over its places, then every `stride`-th of the results."""
    weight, (rows, columns) = w[f"{name}.weight"], x.shape[2:]
    reach = weight.shape[-1] // 2
    padded = torch.zeros(*x.shape[:2], rows + 2 * reach, columns + 2 * reach)
    padded[:, :, reach : reach + rows, reach : reach + columns] = x
    out = sum(
        torch.einsum("bihw,oi->bohw", padded[:, :, i : i + rows, j : j + columns], weight[:, :, i, j])
        for i in range(weight.shape[-1])
        for j in range(weight.shape[-1])
    )
    assert isinstance(out, Tensor)
    return (out + w[f"{name}.bias"][:, None, None])[:, :, ::stride, ::stride]


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, keys: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, N, D), (B, K, D), (B, K, D); keys (B, K) or (B, N, K), False for those that count for nothing."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bnhd,bkhd->bhnk", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() if keys is None else scores.exp() * keys.reshape(len(keys), 1, -1, k.shape[1])
    return torch.einsum("bhnk,bkhd->bnhd", weights / weights.sum(-1, keepdim=True), v).flatten(2)


def plain_attention(x: Tensor, context: Tensor, w: Weights, name: str, heads: int, keys: Tensor | None = None) -> Tensor:
    """`PlainAttention`."""
    k, v = linear(context, w, f"{name}.kv").chunk(2, dim=-1)
    return linear(attended(linear(x, w, f"{name}.q"), k, v, heads, keys), w, f"{name}.out")


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def silu(x: Tensor) -> Tensor:
    """x times the logistic function."""
    return x / (1 + (-x).exp())
