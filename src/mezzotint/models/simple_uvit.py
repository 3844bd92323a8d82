"""The U-ViT of simple diffusion (Hoogeboom et al. 2023, section 3.5): a UNet in pixels whose whole middle is a transformer.

Convolutions work where maps are large and narrow; the bulk of the weights stands in a transformer at 16 x 16, where they cost least
memory. Time and class shift and scale the residual blocks, and the hidden layer of the transformer's MLPs. Dropout is kept to
the transformer. It shares little with `uvit.py`, which has the same name.

Where we differ: the largest maps are avoided by patches instead of wavelets, which the paper found a little better. The network is
told t instead of the signal-to-noise ratio. What the paper leaves open is done as in `unet.py`: maps are joined by
concatenation, each of the way down with its counterpart on the way up, and any multiple of the patch will do for height and
width. Text enters by cross-attention in the transformer, as in the paper's text-to-image networks.

B batch, C channels, N image tokens, L text tokens, D width, E width of the condition, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import PlainAttention, SelfAttention
from mezzotint.models.blocks import zero
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import TimeEmbedding, as_picture, resample


@dataclass
class SimpleUViTConfig(DenoiserConfig, kind="simple_uvit"):
    """Sizes of a simple diffusion U-ViT; as they stand here, those for ImageNet at 128 px.

    widths: channels of the levels with convolutions, from the picture down; layers: residual blocks of each, on either way. Every
    level halves the sides. width, depth, heads, dropout: of the transformer below them. side: of its table of positions.
    condition: width of what time and class become. classes: labels from 0 to one less, 0 where the network knows none. text_width:
    of the text features, 0 where it reads none. The paper's networks predict the velocity of a variance-preserving path, whose
    noise grows with the size of the picture (`flow.path.vp_shifted_cosine`).
    """

    widths: tuple[int, ...] = (128, 256, 512)
    layers: int = 2
    width: int = 2048
    depth: int = 36
    heads: int = 4
    dropout: float = 0.2
    side: int = 16
    condition: int = 1024
    groups: int = 32
    patch: int = 1
    channels: int = 3
    classes: int = 1000
    text_width: int = 0
    prediction: Prediction = "vp_velocity"

    def build(self) -> "SimpleUViT":
        return SimpleUViT(self)


class FilmResBlock(nn.Module):
    """Two convolutions, and the condition's scale and shift before the second: (B, C, H, W) and c (B, E) -> (B, out, H, W).

    c is already through a SiLU. At first the block adds nothing to x.
    """

    def __init__(self, channels: int, out: int, condition: int, groups: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, channels)
        self.conv_in = nn.Conv2d(channels, out, 3, padding=1)
        self.film = nn.Linear(condition, 2 * out)
        self.norm_out = nn.GroupNorm(groups, out)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        zero(self.conv_out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.film(c)[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        out: Tensor = self.skip(x) + self.conv_out(F.silu(torch.addcmul(shift, h, 1 + scale)))
        return out


class FilmDown(nn.Module):
    """Residual blocks of a level, then half the size: the maps that the way up reads again, and what goes on down."""

    def __init__(self, config: SimpleUViTConfig, width: int, below: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FilmResBlock(width, width, config.condition, config.groups) for _ in range(config.layers))
        self.smaller = nn.Conv2d(width, below, 3, stride=2, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x, c)
            maps.append(x)
        return maps, self.smaller(x)


class FilmUp(nn.Module):
    """Twice the size, then residual blocks, each of which takes a map that it reads again off the end of `maps`."""

    def __init__(self, config: SimpleUViTConfig, width: int, below: int) -> None:
        super().__init__()
        self.larger = nn.Conv2d(below, width, 3, padding=1)
        self.blocks = nn.ModuleList(FilmResBlock(2 * width, width, config.condition, config.groups) for _ in range(config.layers))

    def forward(self, x: Tensor, maps: list[Tensor], c: Tensor) -> Tensor:
        x = self.larger(F.interpolate(x, maps[-1].shape[2:], mode="nearest"))
        for block in self.blocks:
            x = block(torch.cat([x, maps.pop()], dim=1), c)
        return x


class FilmMLP(nn.Module):
    """D -> 4 D -> D with a GELU; the condition scales and shifts the hidden layer. Zero at first."""

    def __init__(self, dim: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 4 * dim)
        self.film = nn.Linear(condition, 8 * dim)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(4 * dim, dim)
        zero(self.outer)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.film(c)[:, None].chunk(2, dim=-1)
        hidden = torch.addcmul(shift, F.gelu(self.inner(x)), 1 + scale)
        out: Tensor = self.outer(self.dropout(hidden))
        return out


class SimpleUViTBlock(nn.Module):
    """Attention, attention to the text where there is one, and MLP, each after a LayerNorm. At first the block is the identity."""

    def __init__(self, config: SimpleUViTConfig) -> None:
        super().__init__()
        dim = config.width
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, config.heads)
        self.norm_cross = nn.LayerNorm(dim) if config.text_width else None
        self.cross = PlainAttention(dim, config.heads, config.text_width) if config.text_width else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = FilmMLP(dim, config.condition, config.dropout)
        zero(self.attention.out)
        if self.cross is not None:
            zero(self.cross.out)

    def forward(self, x: Tensor, c: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), c (B, E), text (B, L, text_width), mask (B, L) -> x."""
        x = x + self.attention(self.norm_attention(x))
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.cross(self.norm_cross(x), text, mask)
        x = x + self.mlp(self.norm_mlp(x), c)
        return x


class SimpleUViT(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with label and text where the configuration says so -> prediction, same shape.

    H and W are multiples of the patch. ValueError where the label is missing. At initialisation the output is zero, blocks of the
    transformer are identities, and residual blocks add nothing.
    """

    def __init__(self, config: SimpleUViTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        condition, pixels = config.condition, config.patch**2 * config.channels
        levels = list(zip(config.widths, (*config.widths[1:], config.width), strict=True))
        self.embed_picture = nn.Conv2d(pixels, config.widths[0], 3, padding=1)
        self.embed_time = TimeEmbedding(condition)
        self.embed_label = nn.Embedding(config.classes + 1, condition) if config.classes else None  # the last row is no class
        self.down = nn.ModuleList(FilmDown(config, width, below) for width, below in levels)
        self.positions = nn.Parameter(0.01 * torch.randn(config.side**2, config.width))
        self.transformer = nn.ModuleList(SimpleUViTBlock(config) for _ in range(config.depth))
        self.up = nn.ModuleList(FilmUp(config, width, below) for width, below in reversed(levels))
        self.norm = nn.GroupNorm(config.groups, config.widths[0])
        self.head = nn.Conv2d(config.widths[0], pixels, 3, padding=1)
        zero(self.head)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation."""
        return [module for module in self.modules() if isinstance(module, FilmResBlock | SimpleUViTBlock)]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        picture = as_picture(x, p)[:, :, 0]
        c = F.silu(self._condition(t, cond))

        h = self.embed_picture(F.pixel_unshuffle(picture, p))
        maps: list[Tensor] = []
        for level in self.down:
            seen, h = level(h, c)
            maps += seen

        rows, columns = h.shape[-2:]
        tokens = h.flatten(2).mT + resample(self.positions, rows, columns)
        for block in self.transformer:
            tokens = block(tokens, c, cond.text, cond.mask)
        h = tokens.mT.unflatten(2, (rows, columns))

        for level in self.up:
            h = level(h, maps, c)

        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), p).reshape(x.shape)

    def _condition(self, t: Tensor, cond: Cond) -> Tensor:
        c: Tensor = self.embed_time(t)
        if self.embed_label is None:
            return c
        if cond.label is None:
            raise ValueError(f"label must be given to this network: (B,) numbers of classes below {self.config.classes}, -1 for none")
        return c + self.embed_label(cond.label.where(cond.label >= 0, self.config.classes))


def simple_uvit_128() -> SimpleUViTConfig:
    """For ImageNet at 128 px."""
    return SimpleUViTConfig()


def simple_uvit_256() -> SimpleUViTConfig:
    """For ImageNet at 256 px: patches where the paper has one wavelet transform."""
    return simple_uvit_128().replace(patch=2)


def simple_uvit_512() -> SimpleUViTConfig:
    """For ImageNet at 512 px: patches where the paper has two wavelet transforms."""
    return simple_uvit_128().replace(patch=4)


PRESETS: dict[str, Callable[[], SimpleUViTConfig]] = {
    "simple-uvit-128": simple_uvit_128,
    "simple-uvit-256": simple_uvit_256,
    "simple-uvit-512": simple_uvit_512,
}
