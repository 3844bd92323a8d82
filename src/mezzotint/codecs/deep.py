"""The deep-compression autoencoder (DC-AE, Chen et al. 2024), as SANA has it: 32 pixels a side for one of the latents', 32 channels.

Wherever the sides of a map are halved or doubled, a shortcut without weights carries its numbers on: pixels go into channels, or come
out of them, and channels are averaged or repeated until they fit. What a convolution adds to it starts from there. At the finer
levels blocks are convolutions, at the coarser ones linear attention at several scales and a gated MLP with a convolution inside
(EfficientViT, Cai et al. 2022). There is no distribution: a picture has one z.

What to know of the published network: sides are halved by convolutions with a stride and doubled by nearest neighbours, where the paper
has pixel shuffles. The rows of its projection go head by head, query, key and value of each in turn; diffusers cuts them into thirds
and calls these to_q, to_k and to_v, which they are not. Where a map has no more places than a head has channels, diffusers computes the
same attention over pairs of places; here keys are always summed first.

Where we differ: nothing that changes a number. The paper's own networks (pixel shuffles and batch norms) are not here.

B batch, C channels of the latents, H and W rows and columns, f pixels a side for one of the latents', D width, N places, d channels of
a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.codecs.codec import Codec, CodecConfig
from mezzotint.models.attention import attend_linearly
from mezzotint.models.blocks import MixFFN


@dataclass
class DeepConfig(CodecConfig, kind="deep"):
    """Sizes of a deep-compression autoencoder; as they stand here, those of SANA's.

    widths: channels of every level, from the picture down; each level but the last halves its sides. encoder_depths, decoder_depths:
    blocks of every level, in the same order. attending: how many of the coarsest levels have attention. head: channels of a head.
    kernels: of the convolutions that give queries, keys and values at further scales; odd numbers. channels: of the latents. scale:
    latents leave as z * scale.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attending: int = 3
    head: int = 32
    kernels: tuple[int, ...] = (5,)
    channels: int = 32
    scale: float = 0.41407

    def build(self) -> "Deep":
        return Deep(self)


def average(x: Tensor, channels: int) -> Tensor:
    """(B, k channels, H, W) -> (B, channels, H, W): means of k neighbours."""
    return x.unflatten(1, (channels, -1)).mean(2)


def duplicate(x: Tensor, channels: int) -> Tensor:
    """(B, channels / k, H, W) -> (B, channels, H, W): every channel k times in a row."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class Norm(nn.RMSNorm):
    """RMS norm of the last axis with a bias."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class MapNorm(Norm):
    """The same of the channels of a map (B, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvBlock(nn.Module):
    """Two convolutions and a norm after them: (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_out = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = MapNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.conv_out(F.silu(self.conv_in(x))))
        return out


class MultiScaleAttention(nn.Module):
    """Linear attention of the places of a map at several scales: (B, D, H, W) -> (B, N, D).

    Further scales are further heads: queries, keys and values of a neighbourhood, a depthwise convolution and then one that mixes
    the channels of each of the three in each head.
    """

    def __init__(self, dim: int, head: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.head = head
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.scales = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * dim, 3 * dim, kernel, padding=kernel // 2, groups=3 * dim, bias=False),
                nn.Conv2d(3 * dim, 3 * dim, 1, groups=3 * dim // head, bias=False),
            )
            for kernel in kernels
        )
        self.out = nn.Linear((1 + len(kernels)) * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.movedim(1, -1)).movedim(-1, 1)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)
        q, k, v = scales.flatten(2).unflatten(1, (-1, 3, self.head)).mT.unbind(2)  # each (B, heads of all scales, N, d)
        out: Tensor = self.out(attend_linearly(q, k, v).to(x.dtype))
        return out


class AttentionBlock(nn.Module):
    """Multi-scale attention and Mix-FFN, and a norm after each: (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, dim: int, head: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = MultiScaleAttention(dim, head, kernels)
        self.norm_attention = Norm(dim)
        self.mlp = MixFFN(dim, 4 * dim)
        self.norm_mlp = Norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        tokens = x.flatten(2).mT
        tokens = tokens + self.norm_attention(self.attention(x))
        tokens = tokens + self.norm_mlp(self.mlp(tokens, rows, columns))
        return tokens.mT.unflatten(2, (rows, columns))


class Smaller(nn.Module):
    """(B, D, H, W) -> (B, out, H / 2, W / 2): a convolution, added to pixels that went into channels and were averaged."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.conv = nn.Conv2d(dim, out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + average(F.pixel_unshuffle(x, 2), self.out)
        return y


class Larger(nn.Module):
    """(B, D, H, W) -> (B, out, 2 H, 2 W): a convolution, added to channels that were repeated and went into pixels."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.conv = nn.Conv2d(dim, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest")) + F.pixel_shuffle(duplicate(x, 4 * self.out), 2)
        return y


def blocks(config: DeepConfig, level: int, depth: int) -> list[nn.Module]:
    """The blocks of a level, counted from the picture."""
    dim = config.widths[level]
    if level < len(config.widths) - config.attending:
        return [ConvBlock(dim) for _ in range(depth)]
    return [AttentionBlock(dim, config.head, config.kernels) for _ in range(depth)]


class Encoder(nn.Module):
    """(B, 3, H, W) -> z (B, C, H / f, W / f). A level ends with what leads to the next."""

    def __init__(self, config: DeepConfig) -> None:
        super().__init__()
        widths = config.widths
        levels = [blocks(config, level, depth) for level, depth in enumerate(config.encoder_depths)]
        for level, (above, below) in zip(levels, pairwise(widths), strict=False):
            level.append(Smaller(above, below))
        self.channels = config.channels
        self.embed = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(nn.Sequential(*level) for level in levels)
        self.head = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.embed(images)
        for level in self.levels:
            h = level(h)
        z: Tensor = self.head(h) + average(h, self.channels)
        return z


class Decoder(nn.Module):
    """z (B, C, H / f, W / f) -> (B, 3, H, W). Levels are counted from the picture; one begins with what leads to it."""

    def __init__(self, config: DeepConfig) -> None:
        super().__init__()
        widths = config.widths
        levels = [blocks(config, level, depth) for level, depth in enumerate(config.decoder_depths)]
        for level, (above, below) in zip(levels, pairwise(widths), strict=False):
            level.insert(0, Larger(below, above))
        self.width = widths[-1]
        self.embed = nn.Conv2d(config.channels, widths[-1], 3, padding=1)
        self.levels = nn.ModuleList(nn.Sequential(*level) for level in levels)
        self.norm = MapNorm(widths[0])
        self.head = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.embed(z) + duplicate(z, self.width)
        for level in reversed(self.levels):
            h = level(h)
        images: Tensor = self.head(F.relu(self.norm(h)))
        return images


class Deep(Codec):
    """Pictures (B, 3, H, W) to latents (B, C, H / f, W / f) and back; see `Codec`."""

    def __init__(self, config: DeepConfig) -> None:
        super().__init__(config.channels, 2 ** (len(config.widths) - 1), config.scale)
        _check(config)
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation, those of the encoder first, and what changes sizes between them."""
        levels = [*self.encoder.levels, *reversed(self.decoder.levels)]
        return [block for level in levels for block in level.children()]

    def compress(self, images: Tensor) -> Tensor:
        self.latent_shape((images.shape[-2], images.shape[-1]))
        z: Tensor = self.encoder(images)
        return z

    def restore(self, z: Tensor) -> Tensor:
        images: Tensor = self.decoder(z)
        return images


def _check(config: DeepConfig) -> None:
    levels, last = len(config.widths), config.widths[-1]
    for name, depths in (("encoder_depths", config.encoder_depths), ("decoder_depths", config.decoder_depths)):
        if len(depths) != levels:
            raise ValueError(f"{name} must have one number for each of the {levels} widths, got {len(depths)}")
        if min(depths) < 1:
            raise ValueError(f"{name} must be positive, got {depths}")
    if not 0 <= config.attending <= levels:
        raise ValueError(f"attending must be from 0 to the number of levels, {levels}, got {config.attending}")
    for above, below in pairwise(config.widths):
        if 4 * above % below:
            raise ValueError(f"each of the widths must divide four times the one before it, got {above} and {below}")
    if last % config.channels:
        raise ValueError(f"channels must divide the last of the widths, {last}, got {config.channels}")
    if any(width % config.head for width in config.widths[levels - config.attending :]):
        raise ValueError(f"head must divide the widths of levels with attention, got {config.head}")
    if any(kernel % 2 == 0 for kernel in config.kernels):
        raise ValueError(f"kernels must be odd, got {config.kernels}")


def sana() -> DeepConfig:
    """The autoencoder of SANA, 312M parameters; 1.0 and 1.1 have one form."""
    return DeepConfig()


PRESETS: dict[str, Callable[[], DeepConfig]] = {"deep-sana": sana}
