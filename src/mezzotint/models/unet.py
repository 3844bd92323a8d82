"""The UNet of latent diffusion (Rombach et al. 2022), as Stable Diffusion 1.5 and SDXL (Podell et al. 2023) have it.

Residual blocks at three or four resolutions, and at some of them spatial transformers that read the text. What is seen on the way
down is read again on the way up. SDXL is told the pooled text, the picture's size and where it was cut from, too.

Where we differ: the time is t = i / 1000, with i the (fractional) index into the 1,000 steps of the path that the published networks
know. A network knows no path; the code that knows one reads the network through `flow.path.from_discrete`. Text has a mask. The
published code has none, and attends to padding: that is a mask of None. Any height and width will do: on the way up a map takes
the size of the one it is joined with, as diffusers has it.

B batch, C channels, N image tokens (height times width), L text tokens, D width, E width of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import PlainAttention
from mezzotint.models.blocks import GEGLU, ResBlock, zero
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig, told
from mezzotint.models.embed import TimeEmbedding, VectorEmbedding, as_picture, sinusoid

# What SDXL is told of the picture, each number as a sinusoid: the origin's four and the size's two.
NUMBERS, FREQUENCIES = 6, 256


@dataclass
class UNetConfig(DenoiserConfig, kind="unet"):
    """Sizes of a UNet; as they stand here, those of Stable Diffusion 1.5.

    widths: channels of every level, from the picture down. depths: blocks in the spatial transformers of a level, 0 where there
    are none; middle: in the one at the bottom. heads: of the attention at every level. layers: residual blocks of a level on the
    way down; there is one more on the way up. groups: of the group norms. text_width: of the text features. pooled_width: of the
    pooled text; a network that has one is told the picture's size and origin, too, and 0 stands for neither. linear: whether files
    keep the projections around transformers as linear layers, or as 1 x 1 convolutions; the numbers are the same. guidance, jump:
    whether it is told these numbers. The networks
    named here predict the noise of a variance-preserving path; others of this form, its velocity ("vp_velocity").
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    middle: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers: int = 2
    groups: int = 32
    channels: int = 4
    text_width: int = 768
    pooled_width: int = 0
    linear: bool = False
    guidance: bool = False
    jump: bool = False
    prediction: Prediction = "noise"
    patch: ClassVar[int] = 1  # height and width are multiples of this

    def build(self) -> "UNet":
        return UNet(self)


class TransformerBlock(nn.Module):
    """Attention of (B, N, D) to itself, attention to the text (B, L, text_width), MLP; each after a LayerNorm."""

    def __init__(self, dim: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = PlainAttention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross = PlainAttention(dim, heads, text_width)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = GEGLU(dim, 4 * dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        x = x + self.cross(self.norm_cross(x), text, mask)
        x = x + self.mlp(self.norm_mlp(x))
        return x


class SpatialTransformer(nn.Module):
    """Transformer blocks on the places of a map (B, D, H, W). At first it adds nothing."""

    def __init__(self, dim: int, heads: int, depth: int, text_width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.inner = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, text_width) for _ in range(depth))
        self.outer = nn.Linear(dim, dim)
        zero(self.outer)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.inner(self.norm(x).flatten(2).mT)
        for block in self.blocks:
            tokens = block(tokens, text, mask)
        return x + self.outer(tokens).mT.unflatten(2, x.shape[2:])


class UNetBlock(nn.Module):
    """A residual block, and a spatial transformer where the level has them."""

    def __init__(self, config: UNetConfig, channels: int, level: int, depth: int) -> None:
        super().__init__()
        width = config.widths[level]
        self.res = ResBlock(channels, width, 4 * config.widths[0], config.groups)
        self.transformer = SpatialTransformer(width, config.heads[level], depth, config.text_width, config.groups) if depth else None

    def forward(self, x: Tensor, c: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), c (B, E), text (B, L, text_width), mask (B, L) -> (B, D, H, W)."""
        x = self.res(x, c)
        return x if self.transformer is None else self.transformer(x, text, mask)


class Down(nn.Module):
    """A level on the way down. It gives the maps that the way up reads again; the last one goes on down."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width, above = config.widths[level], config.widths[max(level - 1, 0)]
        self.blocks = nn.ModuleList(
            UNetBlock(config, width if number else above, level, config.depths[level]) for number in range(config.layers)
        )
        last = level == len(config.widths) - 1
        self.smaller = None if last else nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, c: Tensor, text: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x, c, text, mask)
            maps.append(x)
        return maps if self.smaller is None else [*maps, self.smaller(x)]


class Up(nn.Module):
    """A level on the way up. It takes the maps that it reads again off the end of `maps`."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width, above = config.widths[level], config.widths[max(level - 1, 0)]
        below = config.widths[min(level + 1, len(config.widths) - 1)]
        came, joined = [below] + [width] * config.layers, [width] * config.layers + [above]
        self.blocks = nn.ModuleList(UNetBlock(config, a + b, level, config.depths[level]) for a, b in zip(came, joined, strict=True))
        self.larger = nn.Conv2d(width, width, 3, padding=1) if level else None

    def forward(self, x: Tensor, maps: list[Tensor], c: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(torch.cat([x, maps.pop()], dim=1), c, text, mask)
        return x if self.larger is None else self.larger(F.interpolate(x, maps[-1].shape[2:], mode="nearest"))


class UNet(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with text -> noise of the same shape; any H and W.

    Where the configuration has a pooled width, Cond has pooled and size, or it is a ValueError; a picture that says nothing of its
    origin is whole, and as large as ever. At initialisation the output is zero, and residual blocks and transformers add nothing.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        if not len(config.widths) == len(config.depths) == len(config.heads):
            raise ValueError(f"depths and heads must have one number for each of the {len(config.widths)} widths")
        width, levels = config.widths[0], range(len(config.widths))
        self.embed_picture = nn.Conv2d(config.channels, width, 3, padding=1)
        self.embed_time = TimeEmbedding(4 * width, frequencies=width)
        self.embed_guidance = TimeEmbedding(4 * width, frequencies=width) if config.guidance else None
        self.embed_jump = TimeEmbedding(4 * width, frequencies=width) if config.jump else None
        told = config.pooled_width + NUMBERS * FREQUENCIES
        self.embed_told = VectorEmbedding(told, 4 * width) if config.pooled_width else None
        self.down = nn.ModuleList(Down(config, level) for level in levels)
        self.middle = nn.ModuleList(UNetBlock(config, config.widths[-1], levels[-1], depth) for depth in (config.middle, 0))
        self.up = nn.ModuleList(Up(config, level) for level in reversed(levels))
        self.norm = nn.GroupNorm(config.groups, width)
        self.head = nn.Conv2d(width, config.channels, 3, padding=1)
        zero(self.head)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation. Nearly each has shapes of its own: who compiles them needs a graph for each."""
        return [module for module in self.modules() if isinstance(module, UNetBlock)]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        picture = as_picture(x, 1)[:, :, 0]
        text, mask = cond.text, cond.mask
        c = F.silu(self._condition(t, cond))

        maps = [self.embed_picture(picture)]
        for level in self.down:
            maps += level(maps[-1], c, text, mask)
        h = maps[-1]
        for block in self.middle:
            h = block(h, c, text, mask)
        for level in self.up:
            h = level(h, maps, c, text, mask)

        return self.head(F.silu(self.norm(h))).reshape(x.shape)

    def _condition(self, t: Tensor, cond: Cond) -> Tensor:
        c: Tensor = self.embed_time(t) + told(self, cond)
        if self.embed_told is None:
            return c
        if cond.size is None:
            raise ValueError("size must be given to this network: height and width in pixels, (B, 2)")
        origin = torch.cat([cond.size, torch.zeros_like(cond.size)], dim=1) if cond.origin is None else cond.origin
        numbers = sinusoid(torch.cat([origin, cond.size], dim=1), FREQUENCIES).flatten(1)
        return c + self.embed_told(torch.cat([cond.pooled, numbers], dim=1))


def sd15() -> UNetConfig:
    """Stable Diffusion 1.5, 860M parameters."""
    return UNetConfig()


def sdxl() -> UNetConfig:
    """Stable Diffusion XL, 2.57B parameters: deep transformers at the two coarser of three levels, two text encoders."""
    return sd15().replace(
        widths=(320, 640, 1280), depths=(0, 2, 10), middle=10, heads=(5, 10, 20), text_width=2048, pooled_width=1280, linear=True
    )


PRESETS: dict[str, Callable[[], UNetConfig]] = {"sd1.5": sd15, "sdxl": sdxl}
