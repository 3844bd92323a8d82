"""PixArt-alpha and -Sigma (Chen et al. 2023, 2024): a DiT that reads text by cross-attention, with one modulation for all blocks.

adaLN-single: one layer turns the time into shifts, scales and gates; a block adds a table of its own. Per-block layers would be
27% of the parameters.

Where we differ: a null text is one without real tokens, from which nothing is attended, instead of a learned one. Sigma's
compression of keys and values is not here: the published 1024 px weights do without.

B batch, C channels, N image tokens, L text tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import CrossAttention, SelfAttention
from mezzotint.models.blocks import MLP, Head, ModulationTable, SharedModulation, TableHead, gated, initialise, modulate
from mezzotint.models.class_dit import AdaLNZeroBlock, ClassDiT
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import (
    SizeEmbedding,
    TextEmbedding,
    TimeEmbedding,
    as_picture,
    patchify,
    sincos_2d_mae,
    spanning_positions,
    unpatchify,
)


@dataclass
class PixArtConfig(DenoiserConfig, kind="pixart"):
    """Sizes of a PixArt; as they stand here, those of alpha at 1024 px.

    span: positions run from 0 to this along both sides, whatever the size of the picture. size: whether it is told the picture's
    size. variance: whether the head has channels for a learned variance, as published; they are not part of the output.
    text_width: of the text features. The published networks predict the noise of a variance-preserving path.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    patch: int = 2
    channels: int = 4
    text_width: int = 4096
    span: float = 32.0
    size: bool = True
    variance: bool = True
    prediction: Prediction = "noise"

    def build(self) -> "PixArt":
        return PixArt(self)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the text (without norm or gate), MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulation = ModulationTable(dim, 6)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads)
        self.cross = CrossAttention(dim, heads)
        self.mlp = MLP(dim, approximate="tanh")

    def forward(self, x: Tensor, c: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), c (B, 6, D), text (B, L, D), mask (B, L) -> x."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = gated(x, gate_a, self.attention(modulate(self.norm(x), shift_a, scale_a)))
        x = x + self.cross(x, text, mask)
        x = gated(x, gate_m, self.mlp(modulate(self.norm(x), shift_m, scale_m)))
        return x


class PixArt(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with text, and size where the configuration says so -> noise of the same shape.

    H and W are multiples of the patch. At initialisation the output is zero; blocks are no identities, since gates start at their
    tables, but cross-attention adds nothing.
    """

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size = config.width, config.patch**2 * config.channels
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_text = TextEmbedding(config.text_width, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_size = SizeEmbedding(width) if config.size else None
        self.modulation = SharedModulation(width, 6)
        blocks = [PixArtBlock(width, config.heads) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.head = TableHead(width, (2 if config.variance else 1) * patch_size)
        initialise(self, self.head.linear, *(block.cross.out for block in blocks))
        nn.init.normal_(self.modulation.linear.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        picture = as_picture(x, p)
        rows, columns = picture.shape[-2] // p, picture.shape[-1] // p

        positions = sincos_2d_mae(spanning_positions(rows, columns, self.config.span, x.device), self.config.width)
        image = self.embed_patch(patchify(picture, p)) + positions.to(self.embed_patch.weight.dtype)
        text = self.embed_text(cond.text)
        c = self._condition(t, cond)
        modulation = self.modulation(c)

        for block in self.blocks:
            image = block(image, modulation, text, cond.mask)

        patches = self.head(image, c)
        noise = patches.unflatten(-1, (p * p, -1))[..., : picture.shape[1]].flatten(2)  # without the variance
        return unpatchify(noise, p, picture.shape).reshape(x.shape)

    def _condition(self, t: Tensor, cond: Cond) -> Tensor:
        c: Tensor = self.embed_time(t)
        if self.embed_size is None:
            return c
        if cond.size is None:
            raise ValueError("size must be given to this network: height and width in pixels, (B, 2)")
        return c + self.embed_size(cond.size)


@torch.no_grad()
def start_from(net: PixArt, dit: ClassDiT) -> None:
    """Start a PixArt from a class-conditional DiT of the same sizes (Chen et al. 2023, section 2.3).

    What both have is taken over, and tables are set so that at t = 0.5 every modulation is the DiT's without a class. Cross-attention
    starts at nothing, so there the output is the DiT's too, apart from what a size adds. ValueError where a size differs.
    """
    if dit.config.variant != "adaln_zero":
        raise ValueError(f"dit must have modulations to start from, adaln_zero, got {dit.config.variant}")
    for name in ("width", "depth", "heads", "patch", "channels", "variance"):
        ours, theirs = getattr(net.config, name), getattr(dit.config, name)
        if ours != theirs:
            raise ValueError(f"{name} must be the DiT's, {theirs}, got {ours}")
    own = net.state_dict()
    net.load_state_dict({name: x for name, x in dit.state_dict().items() if name in own}, strict=False)
    c = dit.embed_time(torch.full((1,), 0.5, device=dit.head.linear.weight.device))
    shared = net.modulation(c)[0]
    for block, given in zip(net.blocks, dit.blocks, strict=True):
        assert isinstance(block, PixArtBlock)
        assert isinstance(given, AdaLNZeroBlock)
        block.modulation.table.copy_(torch.cat(given.modulation(c)) - shared)
    assert isinstance(dit.head, Head)
    net.head.modulation.table.copy_(torch.cat(dit.head.modulation(c)) - c)


def pixart_alpha_1024() -> PixArtConfig:
    """PixArt-alpha at 1024 px, told the picture's size."""
    return PixArtConfig()


def pixart_alpha_512() -> PixArtConfig:
    """PixArt-alpha at 512 px, 611M parameters."""
    return pixart_alpha_1024().replace(size=False)


def pixart_alpha_256() -> PixArtConfig:
    """PixArt-alpha at 256 px: positions as they were trained, not yet stretched."""
    return pixart_alpha_512().replace(span=16.0)


def pixart_sigma() -> PixArtConfig:
    """PixArt-Sigma at 512 px to 2K: the positions always span the same; a better autoencoder, and 300 tokens of text."""
    return pixart_alpha_512()


PRESETS: dict[str, Callable[[], PixArtConfig]] = {
    "pixart-alpha-1024": pixart_alpha_1024,
    "pixart-alpha-512": pixart_alpha_512,
    "pixart-alpha-256": pixart_alpha_256,
    "pixart-sigma": pixart_sigma,
}
