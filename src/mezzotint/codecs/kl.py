"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022), as Stable Diffusion, SDXL, SD3 and FLUX have it.

Residual blocks at four resolutions and one attention at the coarsest, down and up again. The encoder gives the mean and the
log-variance of a normal distribution, which training keeps close to the standard one, by a little (KL).

What to know of the published networks: a convolution that halves a map pads it on the right and below only. The attention has one
head as wide as the map. The decoder has one residual block more a level than the encoder. Those of SD 1.5 and SDXL mix the channels
of moments and latents once more, by 1 x 1 convolutions; later ones do not. SDXL's overflows in float16: give it bfloat16 or float32.

Where we differ: nothing that changes a number. Encoding gives the mode; who wants to draw asks `posterior`.

B batch, C channels of the latents, H and W rows and columns, f pixels a side for one of the latents', D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.codecs.codec import Codec, CodecConfig
from mezzotint.models.attention import SelfAttention
from mezzotint.models.blocks import ResBlock, zero

EPS = 1e-6  # of all group norms


@dataclass
class KLConfig(CodecConfig, kind="kl"):
    """Sizes of a KL autoencoder; as they stand here, those of Stable Diffusion 1.5.

    widths: channels of every level, from the picture down; each level but the last halves its sides. layers: residual blocks of a
    level of the encoder. groups: of the group norms. attention: at the coarsest resolution. channels: of the latents. quant: 1 x 1
    convolutions of moments and latents. scale, shift: latents leave as (z - shift) * scale.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    attention: bool = True
    channels: int = 4
    quant: bool = True
    scale: float = 0.18215
    shift: float = 0.0

    def build(self) -> "KL":
        return KL(self)


class MapAttention(nn.Module):
    """Attention of all places of a map (B, D, H, W) to each other, with one head. At first it adds nothing."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, EPS)
        self.attention = SelfAttention(dim, heads=1)
        zero(self.attention.out)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.attention(self.norm(x).flatten(2).mT)
        return x + tokens.mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Residual blocks at one resolution: (B, D, H, W) -> (B, out, H, W)."""

    def __init__(self, width: int, out: int, layers: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(out if number else width, out, 0, groups, EPS) for number in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class Down(Level):
    """A level on the way down, which ends with half the sides."""

    def __init__(self, width: int, out: int, layers: int, groups: int) -> None:
        super().__init__(width, out, layers, groups)
        self.smaller = nn.Conv2d(out, out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.smaller(F.pad(self.blocks(x), (0, 1, 0, 1)))
        return out


class Up(Level):
    """A level on the way up, which ends with twice the sides."""

    def __init__(self, width: int, out: int, layers: int, groups: int) -> None:
        super().__init__(width, out, layers, groups)
        self.larger = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.larger(F.interpolate(self.blocks(x), scale_factor=2, mode="nearest"))
        return out


class Middle(nn.Sequential):
    """Between the ways down and up, (B, D, H, W) -> (B, D, H, W): two residual blocks, and attention between them if any."""

    def __init__(self, config: KLConfig) -> None:
        dim, groups = config.widths[-1], config.groups
        attention = MapAttention(dim, groups) if config.attention else nn.Identity()
        super().__init__(ResBlock(dim, dim, 0, groups, EPS), attention, ResBlock(dim, dim, 0, groups, EPS))


class Encoder(nn.Module):
    """(B, 3, H, W) -> moments (B, 2 C, H / f, W / f)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        *sizes, last = pairwise((widths[0], *widths))
        self.embed = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.Sequential(*(Down(*size, config.layers, groups) for size in sizes), Level(*last, config.layers, groups))
        self.middle = Middle(config)
        self.norm = nn.GroupNorm(groups, widths[-1], EPS)
        self.head = nn.Conv2d(widths[-1], 2 * config.channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.middle(self.levels(self.embed(images)))
        moments: Tensor = self.head(F.silu(self.norm(h)))
        return moments


class Decoder(nn.Module):
    """(B, C, H / f, W / f) -> (B, 3, H, W)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        *sizes, last = pairwise((widths[0], *widths))
        layers = config.layers + 1
        self.embed = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.middle = Middle(config)
        self.levels = nn.Sequential(*(Up(*size, layers, groups) for size in sizes), Level(*last, layers, groups))
        self.norm = nn.GroupNorm(groups, widths[-1], EPS)
        self.head = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels(self.middle(self.embed(z)))
        images: Tensor = self.head(F.silu(self.norm(h)))
        return images


class KL(Codec):
    """Pictures (B, 3, H, W) to latents (B, C, H / f, W / f), their mode, and back; see `Codec`.

    At initialisation residual blocks and attention add nothing.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__(config.channels, 2 ** (len(config.widths) - 1), config.scale, config.shift)
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        c = config.channels
        self.quant = nn.Conv2d(2 * c, 2 * c, 1) if config.quant else nn.Identity()
        self.post_quant = nn.Conv2d(c, c, 1) if config.quant else nn.Identity()

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation, those of the encoder first."""
        halves = (self.encoder.levels, self.encoder.middle, self.decoder.middle, self.decoder.levels)
        return [module for half in halves for module in half.modules() if isinstance(module, ResBlock | MapAttention)]

    def compress(self, images: Tensor) -> Tensor:
        mean, _ = self._moments(images)
        return mean

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> mean and log-variance of the normalised latents, each (B, C, H / f, W / f).

        The mean is what `encode` gives. The log-variance of z, clamped to [-30, 20], is 2 log(scale) less.
        """
        mean, logvar = self._moments(images)
        return self.normalise(mean), logvar.clamp(-30, 20) + 2 * math.log(self.scale)

    def restore(self, z: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.post_quant(z))
        return images

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.latent_shape((images.shape[-2], images.shape[-1]))
        mean, logvar = self.quant(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar


def sd15() -> KLConfig:
    """Stable Diffusion 1.x and 2.x, 84M parameters."""
    return KLConfig()


def sdxl() -> KLConfig:
    """SDXL (Podell et al. 2023): the same network trained again."""
    return sd15().replace(scale=0.13025)


def sd3() -> KLConfig:
    """Stable Diffusion 3 (Esser et al. 2024): 16 channels."""
    return sd15().replace(channels=16, quant=False, scale=1.5305, shift=0.0609)


def flux() -> KLConfig:
    """FLUX.1: the form of SD3's, trained again."""
    return sd3().replace(scale=0.3611, shift=0.1159)


PRESETS: dict[str, Callable[[], KLConfig]] = {"kl-sd1.5": sd15, "kl-sdxl": sdxl, "kl-sd3": sd3, "kl-flux": flux}
