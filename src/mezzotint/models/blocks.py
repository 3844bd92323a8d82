"""Transformer blocks and the pieces they share.

adaLN-zero (Peebles & Xie 2023): a block's shifts, scales and gates come from the condition through a layer that starts at
zero, so every block starts as the identity.

B batch, N image tokens, L text tokens, D width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.attention import QKV, Attention, attend
from mezzotint.models.embed import rotate


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) scaled and shifted per sample; shift and scale are (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """x (B, N, D) and a change to it, weighed per sample by a gate (B, D)."""
    return torch.addcmul(x, gate[:, None], change)


class MLP(nn.Sequential):
    """D -> ratio D -> D with a GELU, the exact one: on CPUs its tanh approximation takes twice as long.

    Published weights were trained with the approximation ("tanh") and with biases, and ask for them.
    """

    def __init__(self, dim: int, ratio: int = 4, approximate: Literal["none", "tanh"] = "none", bias: bool = True) -> None:
        inner, outer = nn.Linear(dim, ratio * dim, bias=bias), nn.Linear(ratio * dim, dim, bias=bias)
        super().__init__(inner, nn.GELU(approximate), outer)


class SwiGLU(nn.Module):
    """D -> hidden -> D with a gated SiLU and no biases (Shazeer 2020): W_2 (silu(W_1 x) * W_3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 2 * hidden, bias=False)
        self.outer = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.inner(x).chunk(2, dim=-1)
        out: Tensor = self.outer(self.open(gate) * value)
        return out

    def open(self, gate: Tensor) -> Tensor:
        """How far each channel is let through."""
        return F.silu(gate)


class GeGLU(SwiGLU):
    """The same with a GELU (tanh), as Gemma has it: W_2 (gelu(W_1 x) * W_3 x)."""

    def open(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")


class Modulation(nn.Module):
    """(B, C) -> `chunks` tensors (B, D), all zero at first. C is D unless told otherwise."""

    def __init__(self, dim: int, chunks: int, condition: int | None = None) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(dim if condition is None else condition, chunks * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(nn.functional.silu(c)).chunk(self.chunks, dim=-1)


class SharedModulation(nn.Module):
    """(B, D) -> (B, chunks, D) for all blocks, each of which adds a table of its own (adaLN-single, Chen et al. 2023)."""

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(dim, chunks * dim)

    def forward(self, c: Tensor) -> Tensor:
        return self.linear(F.silu(c)).unflatten(-1, (self.chunks, -1))


class ModulationTable(nn.Module):
    """A block's share in adaLN-single: (B, chunks, D) or (B, 1, D) plus its table -> `chunks` tensors (B, D)."""

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(chunks, dim) / dim**0.5)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return (self.table + c).unbind(1)


class Block(nn.Module):
    """A pre-norm transformer block without conditions, as text encoders use it. It starts as the identity."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim, bias=False)
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
        self.mlp = MLP(dim, bias=False)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = gated(x, gate_a, self.attention(modulate(self.norm(x), shift_a, scale_a), rotation, mask, context))
        x = gated(x, gate_m, self.mlp(modulate(self.norm(x), shift_m, scale_m)))
        return x


class Source(nn.Module):
    """A modality's part in a joint attention: modulated queries, keys and values. It makes nothing of the answer."""

    def __init__(self, dim: int, qkv: QKV, chunks: int = 2) -> None:
        super().__init__()
        self.modulation = Modulation(dim, chunks)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.qkv = qkv

    def ask(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x (B, N, D) and c (B, D) -> queries, keys, values (B, heads, N, d), and what `answer` needs of the modulation."""
        shift, scale, *rest = self.modulation(c)
        return self.qkv(modulate(self.norm(x), shift, scale)), tuple(rest)

    def answer(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """x (B, N, D) and what it attended to (B, N, D) -> x after the block."""
        return x


class Stream(Source):
    """A modality with all weights of a DiT block of its own, apart from the attention, which it shares."""

    def __init__(self, dim: int, qkv: QKV, mlp: nn.Module, chunks: int = 6) -> None:
        super().__init__(dim, qkv, chunks)
        self.out = nn.Linear(dim, dim)
        self.mlp = mlp

    def answer(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        gate_a, shift_m, scale_m, gate_m = rest
        x = gated(x, gate_a, self.out(attended))
        return gated(x, gate_m, self.mlp(modulate(self.norm(x), shift_m, scale_m)))


def converse(
    streams: Sequence[Source], tokens: Sequence[Tensor], c: Tensor, rotation: Tensor | None, mask: Tensor | None, silent: int = 0
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """One attention over the tokens (B, N_i, D) of all streams, one after the other -> what each `answer` needs.

    c: (B, D). rotation and mask: over all tokens in this order. silent: how many of the first tokens are attended to but do not
    attend, and get no answer.
    """
    asked, rests = zip(*(stream.ask(x, c) for stream, x in zip(streams, tokens, strict=True)), strict=True)
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(*asked, strict=True))
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    first, *others = (x.shape[1] for x in tokens)
    attended = attend(q[:, :, silent:], k, v, mask).split([first - silent, *others], dim=1)
    return list(zip(attended, rests, strict=True))


class JointBlock(nn.Module):
    """Two streams with weights of their own and one attention over both, text first (Esser et al. 2024, figure 2b)."""

    def __init__(self, image: Stream, text: Source) -> None:
        super().__init__()
        self.image = image
        self.text = text

    def forward(
        self, image: Tensor, text: Tensor, c: Tensor, rotation: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """image (B, N, D), text (B, L, D), c (B, D), rotation and mask over [text, image] -> image, text."""
        for_text, for_image = converse((self.text, self.image), (text, image), c, rotation, mask)
        return self.image.answer(image, *for_image), self.text.answer(text, *for_text)


class Head(nn.Module):
    """The last layer of a DiT: tokens (B, N, D), normalised and modulated by c (B, D), to patches (B, N, out). Zero at first."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(dim, 2)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        patches: Tensor = self.linear(modulate(self.norm(x), *self.modulation(c)))
        return patches


class TableHead(nn.Module):
    """`Head` with adaLN-single: a table plus c (B, D) modulates."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = ModulationTable(dim, 2)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        patches: Tensor = self.linear(modulate(self.norm(x), *self.modulation(c[:, None])))
        return patches


def initialise(net: nn.Module, *zero: nn.Linear) -> None:
    """DiT's start (Peebles & Xie 2023): Xavier weights and zero biases; modulations and the layers named start at zero."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, Modulation):
            module.reset_parameters()
    for layer in zero:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class GEGLU(nn.Module):
    """D -> hidden -> D with a gated GELU (Shazeer 2020): W_2 (W_1 x * gelu(W_3 x)), with biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 2 * hidden)
        self.outer = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, dim=-1)
        out: Tensor = self.outer(value * F.gelu(gate))
        return out


class MixFFN(nn.Module):
    """A gated MLP with a depthwise 3 x 3 convolution inside: (B, N, D) of a map (rows, columns) -> (B, N, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.outer = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        hidden = F.silu(self.inner(x)).unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        value, gate = self.depthwise(hidden).permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)
        out: Tensor = self.outer(value * F.silu(gate))
        return out


class ResBlock(nn.Module):
    """Two convolutions, and the time added between them: (B, C, H, W) and c (B, E), already through a SiLU -> (B, out, H, W).

    condition: E, 0 where there is no time. eps: of the group norms. At first it adds nothing to x.
    """

    def __init__(self, channels: int, out: int, condition: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, channels, eps)
        self.conv_in = nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(condition, out) if condition else None
        self.norm_out = nn.GroupNorm(groups, out, eps)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        zero(self.conv_out)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        if self.time is not None:
            h = h + self.time(c)[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv_out(F.silu(self.norm_out(h)))
        return out


def zero(*layers: nn.Module) -> None:
    """Set weights and biases to zero."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
