"""SANA (Xie et al. 2024): linear attention and a convolution in the MLP, in the narrow latents of a deep autoencoder.

Attention by ReLU features costs N d^2 instead of N^2 d; the depthwise convolution tells tokens of their neighbours, so there are no
positions at all. Text is read by cross-attention, and the modulation is PixArt's. SANA 1.5 normalises queries and keys.

Where we differ: nothing that changes a number. The guidance of Sprint is not here.

B batch, C channels, N image tokens, L text tokens, D width, d channels of a head, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import QKV, CrossAttention, attend_linearly
from mezzotint.models.blocks import MixFFN, ModulationTable, SharedModulation, TableHead, gated, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import TextEmbedding, TimeEmbedding, as_picture, patchify, unpatchify


@dataclass
class SanaConfig(DenoiserConfig, kind="sana"):
    """Sizes of a SANA; as they stand here, those of 1.6B.

    heads: of the linear attention; cross_heads: of the attention to text. ratio: hidden channels of the MLP for one of D.
    qk_norm: queries and keys normalised across all heads. text_width: of the text features.
    """

    width: int = 2240
    depth: int = 20
    heads: int = 70
    cross_heads: int = 20
    patch: int = 1
    channels: int = 32
    ratio: float = 2.5
    qk_norm: bool = False
    text_width: int = 2304
    prediction: Prediction = "velocity"

    def build(self) -> "Sana":
        return Sana(self)


class LinearAttention(nn.Module):
    """Linear attention of (B, N, D) to itself, see `attend_linearly`."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.qkv = QKV(dim, heads, bias=False, norm="width" if qk_norm else None, eps=1e-5)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(attend_linearly(*self.qkv(x)).to(x.dtype))
        return out


class SanaBlock(nn.Module):
    """Linear attention, cross-attention to the text (without norm or gate), Mix-FFN."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        dim = config.width
        self.modulation = ModulationTable(dim, 6)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = LinearAttention(dim, config.heads, config.qk_norm)
        self.cross = CrossAttention(dim, config.cross_heads, norm=config.qk_norm)
        self.mlp = MixFFN(dim, int(config.ratio * dim))

    def forward(self, x: Tensor, c: Tensor, text: Tensor, mask: Tensor | None, rows: int, columns: int) -> Tensor:
        """x (B, rows columns, D), c (B, 6, D), text (B, L, D), mask (B, L) -> x."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = gated(x, gate_a, self.attention(modulate(self.norm(x), shift_a, scale_a)))
        x = x + self.cross(x, text, mask)
        x = gated(x, gate_m, self.mlp(modulate(self.norm(x), shift_m, scale_m), rows, columns))
        return x


class Sana(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with text -> velocity of the same shape.

    H and W are multiples of the patch. At initialisation the output is zero; blocks are no identities, since gates start at their
    tables, but cross-attention adds nothing.
    """

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size = config.width, config.patch**2 * config.channels
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_text = TextEmbedding(config.text_width, width)
        self.norm_text = nn.RMSNorm(width, eps=1e-5)
        self.embed_time = TimeEmbedding(width)
        self.modulation = SharedModulation(width, 6)
        blocks = [SanaBlock(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.head = TableHead(width, patch_size)
        initialise(self, self.head.linear, *(block.cross.out for block in blocks))
        nn.init.normal_(self.modulation.linear.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        picture = as_picture(x, p)
        rows, columns = picture.shape[-2] // p, picture.shape[-1] // p

        image = self.embed_patch(patchify(picture, p))
        text = self.norm_text(self.embed_text(cond.text))
        c = self.embed_time(t)
        modulation = self.modulation(c)

        for block in self.blocks:
            image = block(image, modulation, text, cond.mask, rows, columns)

        return unpatchify(self.head(image, c), p, picture.shape).reshape(x.shape)


def sana_1600m() -> SanaConfig:
    """SANA 1.6B."""
    return SanaConfig()


def sana_600m() -> SanaConfig:
    """SANA 0.6B."""
    return sana_1600m().replace(width=1152, depth=28, heads=36, cross_heads=16)


def sana15_1600m() -> SanaConfig:
    """SANA 1.5 1.6B (Xie et al. 2025): queries and keys are normalised."""
    return sana_1600m().replace(qk_norm=True)


def sana15_4800m() -> SanaConfig:
    """SANA 1.5 4.8B: three times as deep."""
    return sana15_1600m().replace(depth=60)


PRESETS: dict[str, Callable[[], SanaConfig]] = {
    "sana-1600m": sana_1600m,
    "sana-600m": sana_600m,
    "sana1.5-1600m": sana15_1600m,
    "sana1.5-4800m": sana15_4800m,
}
