"""What a forward pass costs: operations by closed formulas, one for each architecture.

They have what grows with the tokens, and the modulation; layers that embed or that stand at the end are left out, half a percent at
the published sizes. A multiplication and its addition are two operations: a product of matrices (n, k) and (k, m) is 2 n k m.

N image tokens (in `unet` and `simple_uvit` places of the largest map), L text tokens, T both, D width.
"""

from collections.abc import Callable
from typing import Any

from mezzotint.config import Config
from mezzotint.models.class_dit import ClassDiTConfig
from mezzotint.models.dit import DiTConfig
from mezzotint.models.dit_air import DiTAirConfig
from mezzotint.models.flux import FluxConfig
from mezzotint.models.fuse_dit import FuseDiTConfig
from mezzotint.models.hidream import HiDreamConfig
from mezzotint.models.lumina2 import Lumina2Config
from mezzotint.models.mmdit import MMDiTConfig
from mezzotint.models.pixart import PixArtConfig
from mezzotint.models.sana import SanaConfig
from mezzotint.models.simple_uvit import SimpleUViTConfig
from mezzotint.models.transfusion import TransfusionConfig
from mezzotint.models.unet import UNetConfig
from mezzotint.models.uvit import UViTConfig


def flops(config: Config, tokens: int, text: int) -> int:
    """Operations of one forward for a picture of so many tokens and a text of so many. ValueError for a configuration of no network."""
    if type(config) not in FORMULAS:
        raise ValueError(f"config must be that of a network, got {type(config).__name__}")
    return FORMULAS[type(config)](config, tokens, text)


def masked_flops(config: Any, tokens: int, text: int, kept: int) -> int:
    """The same where the blocks after the mixer see so many of the tokens. For networks that are `maskable`, whose blocks are alike."""
    mixer, rest = config.replace(depth=config.mixer, mixer=0), config.replace(depth=config.depth - config.mixer, mixer=0)
    return flops(mixer, tokens, text) + flops(rest, kept, text)


def block(tokens: int, width: int) -> int:
    """Attention (4 D^2 weights) and MLP (8 D^2) of every token, which asks all tokens."""
    return 2 * tokens * (12 * width**2 + 2 * tokens * width)


def cross(tokens: int, text: int, width: int, text_width: int) -> int:
    """Attention of every token to the text."""
    return 2 * (2 * tokens * width**2 + 2 * text * text_width * width + 2 * tokens * text * width)


def dit(c: DiTConfig, n: int, text: int) -> int:
    """Text has keys and values in every block, and nothing else."""
    d = c.width
    return c.depth * (2 * n * (12 * d**2 + 2 * (n + text) * d) + 2 * text * 2 * d**2 + 12 * d**2)


def class_dit(c: ClassDiTConfig, n: int, text: int) -> int:
    """The image alone, and a modulation a block."""
    return c.depth * (block(n, c.width) + 12 * c.width**2)


def dit_air(c: DiTAirConfig, n: int, text: int) -> int:
    """Text and image as one stream; the modulation is computed for every block, though its weights are shared."""
    return c.depth * (block(n + text, c.width) + 12 * c.width**2)


def mmdit(c: MMDiTConfig, n: int, text: int) -> int:
    """Two modulations a block; a second attention over the image in the first `dual` of them."""
    return c.depth * (block(n + text, c.width) + 24 * c.width**2) + c.dual * 2 * n * (4 * c.width**2 + 2 * n * c.width)


def flux(c: FluxConfig, n: int, text: int) -> int:
    """Two modulations of six parts in a joint block, one of three in a single one."""
    return (c.joint + c.single) * block(n + text, c.width) + (24 * c.joint + 6 * c.single) * c.width**2


def pixart(c: PixArtConfig, n: int, text: int) -> int:
    """The image, which reads the text by cross-attention; the modulation is computed once."""
    return c.depth * (block(n, c.width) + cross(n, text, c.width, c.width))


def sana(c: SanaConfig, n: int, text: int) -> int:
    """Linear attention: sums of d x (d + 1) a head, once over keys and once for queries. An MLP with a 3 x 3 depthwise convolution."""
    d, hidden = c.width, int(c.ratio * c.width)
    attention = 2 * n * (4 * d**2 + 2 * d * (d // c.heads + 1))
    return c.depth * (attention + cross(n, text, d, d) + 2 * n * (3 * d * hidden + 9 * 2 * hidden))


def lumina2(c: Lumina2Config, n: int, text: int) -> int:
    """Fewer keys and values than queries; a gated MLP."""

    def sandwich(tokens: int) -> int:
        d = c.width
        return 2 * tokens * (2 * d**2 + 2 * d * (d * c.kv_heads // c.heads) + 3 * d * c.hidden + 2 * tokens * d)

    return c.depth * sandwich(n + text) + c.refiners * (sandwich(n) + sandwich(text))


def hidream(c: HiDreamConfig, n: int, text: int) -> int:
    """The text is read thrice: itself, the last layer of states, and, in one block each, a layer without answer. Few experts are asked."""
    d, whole, kept = c.width, n + 3 * text, n + 2 * text
    attention = 2 * (3 * whole * d**2 + kept * d**2 + 2 * kept * whole * d)
    asked = 2 * 3 * d * (c.active * c.hidden + c.shared)
    joint = attention + n * asked + 2 * text * 2 * 3 * d * c.hidden
    read = (c.joint + c.single) * 2 * text * c.states_width * d
    return c.joint * joint + c.single * (attention + kept * asked) + read


def uvit(c: UViTConfig, n: int, text: int) -> int:
    """Time, class and text among the tokens, and a join of two widths for every second block."""
    tokens = n + (text if c.text_width else 0) + 2
    return (c.depth + 1) * block(tokens, c.width) + c.depth // 2 * 2 * tokens * 2 * c.width**2


def residual(channels: int, out: int, places: int) -> int:
    """Two 3 x 3 convolutions, and a 1 x 1 where the width changes."""
    return 2 * places * (9 * channels * out + 9 * out**2 + (channels * out if channels != out else 0))


def unet(c: UNetConfig, n: int, text: int) -> int:
    """Level by level: what residual blocks, spatial transformers and changes of size cost on the way down, below, and up."""
    levels = len(c.widths)

    def spatial(level: int, depth: int) -> int:
        d, places = c.widths[level], n // 4**level
        one = 2 * places * (4 * d**2 + 2 * places * d) + cross(places, text, d, c.text_width) + 2 * places * 12 * d**2
        return depth * one + (2 * places * 2 * d**2 if depth else 0)

    total = 2 * residual(c.widths[-1], c.widths[-1], n // 4 ** (levels - 1)) + spatial(levels - 1, c.middle)
    for level, width in enumerate(c.widths):
        places, above, below = n // 4**level, c.widths[max(level - 1, 0)], c.widths[min(level + 1, levels - 1)]
        down = [above] + [width] * (c.layers - 1)
        up = [below + width] + [2 * width] * (c.layers - 1) + [width + above]
        total += sum(residual(a, width, places) for a in down + up) + (len(down) + len(up)) * spatial(level, c.depths[level])
        total += 2 * 9 * width**2 * ((places // 4 if level < levels - 1 else 0) + (4 * places if level else 0))
    return total


def simple_uvit(c: SimpleUViTConfig, n: int, text: int) -> int:
    """`unet` without transformers, above one whose MLPs are scaled and shifted."""
    total, places = 0, n
    for width, below in zip(c.widths, (*c.widths[1:], c.width), strict=True):
        total += c.layers * (residual(width, width, places) + residual(2 * width, width, places))
        total += 2 * 9 * width * below * (places // 4 + places)
        places //= 4
    return total + c.depth * (block(places, c.width) + 2 * 8 * c.width * c.condition)


def transfusion(c: TransfusionConfig, n: int, text: int) -> int:
    """Text and BOI ask each other, the image asks all; a gated MLP."""
    d, said = c.width, text + 1
    return c.depth * 2 * ((n + said) * (4 * d**2 + 3 * d * c.hidden) + 2 * d * (n * (n + said) + said**2))


def fuse_dit(c: FuseDiTConfig, n: int, text: int) -> int:
    """The image alone, which asks itself and the text; the text's keys and values are given."""
    inner, asked = c.heads * c.head, 2 * c.kv_heads * c.head
    return c.depth * 2 * n * (c.width * (2 * inner + asked) + 3 * c.width * c.hidden + 2 * (n + text) * inner)


Formula = Callable[[Any, int, int], int]
FORMULAS: dict[type[Config], Formula] = {
    DiTConfig: dit,
    ClassDiTConfig: class_dit,
    DiTAirConfig: dit_air,
    MMDiTConfig: mmdit,
    FluxConfig: flux,
    PixArtConfig: pixart,
    SanaConfig: sana,
    Lumina2Config: lumina2,
    HiDreamConfig: hidream,
    UViTConfig: uvit,
    UNetConfig: unet,
    SimpleUViTConfig: simple_uvit,
    TransfusionConfig: transfusion,
    FuseDiTConfig: fuse_dit,
}
