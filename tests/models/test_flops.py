"""What a forward pass costs: torch's count against the closed formula of each architecture, within half a percent.

The networks are the published ones at the size of picture that they were made for, on the meta device, where nothing is computed.
The formulas have what grows with the tokens, and the modulation; layers that embed or that stand at the end are the rest.

N image tokens, L text tokens, T both, D width. A product of matrices (n, k) and (k, m) is 2 n k m.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import half
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.models import Cond, DiTConfig
from mezzotint.models.class_dit import ClassDiTConfig, dit_xl_2
from mezzotint.models.dit_air import DiTAirConfig
from mezzotint.models.flux import FluxConfig, flux_dev
from mezzotint.models.hidream import HiDreamConfig, hidream_i1
from mezzotint.models.lumina2 import Lumina2Config, lumina_image_2
from mezzotint.models.mmdit import MMDiTConfig, sd3_medium, sd35_medium
from mezzotint.models.pixart import PixArtConfig, pixart_alpha_1024
from mezzotint.models.sana import SanaConfig, sana_1600m
from mezzotint.models.simple_uvit import SimpleUViTConfig, simple_uvit_128
from mezzotint.models.unet import UNetConfig, sd15, sdxl
from mezzotint.models.uvit import UViTConfig, uvit_h_2, uvit_s_2_text


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
    return c.depth * (block(n, c.width) + 12 * c.width**2)


def dit_air(c: DiTAirConfig, n: int, text: int) -> int:
    return c.depth * (block(n + text, c.width) + 12 * c.width**2)


def mmdit(c: MMDiTConfig, n: int, text: int) -> int:
    """Two modulations a block; a second attention over the image in the first `dual` of them."""
    return c.depth * (block(n + text, c.width) + 24 * c.width**2) + c.dual * 2 * n * (4 * c.width**2 + 2 * n * c.width)


def flux(c: FluxConfig, n: int, text: int) -> int:
    return (c.joint + c.single) * block(n + text, c.width) + (24 * c.joint + 6 * c.single) * c.width**2


def pixart(c: PixArtConfig, n: int, text: int) -> int:
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
    """The text is read thrice: itself, the last layer of states, and, in one block each, a layer of its own. Few experts are asked."""
    d, whole = c.width, n + 3 * text
    attention = 2 * whole * (4 * d**2 + 2 * whole * d)
    asked = 2 * 3 * d * (c.active * c.hidden + c.shared)
    joint = attention + n * asked + 3 * text * 2 * 3 * d * c.hidden
    read = (c.joint + c.single) * 2 * text * c.states_width * d
    return c.joint * joint + c.single * (attention + whole * asked) + read


def uvit(c: UViTConfig, n: int, text: int) -> int:
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


def said(text: int, width: int, pooled: int = 0) -> Cond:
    """Every condition there is, on the meta device, for networks to take what they ask for; states are as long and wide as the text."""
    with torch.device("meta"):
        return Cond(
            text=torch.randn(1, text, width),
            mask=None,
            pooled=torch.randn(1, pooled),
            label=torch.zeros(1, dtype=torch.int64),
            guidance=torch.randn(1),
            size=torch.randn(1, 2),
            states=torch.randn(1, 32, text, width),
        )


Formula = Callable[[Any, int, int], int]
# The network, the side of x, the conditions, the formula.
CASES: dict[str, tuple[Any, int, Cond, Formula]] = {
    "dit": (DiTConfig(width=512, depth=8, heads=8, patch=2, channels=4, text_width=512), 32, said(64, 512, 512), dit),
    "dit-xl-2": (dit_xl_2(), 32, said(0, 0), class_dit),
    "dit-air": (DiTAirConfig(), 128, said(333, 4096, 2048), dit_air),
    "sd3-medium": (sd3_medium(), 128, said(333, 4096, 2048), mmdit),
    "sd3.5-medium": (sd35_medium(), 128, said(333, 4096, 2048), mmdit),
    "flux-dev": (flux_dev(), 128, said(512, 4096, 768), flux),
    "pixart-alpha-1024": (pixart_alpha_1024(), 128, said(120, 4096), pixart),
    "sana-1600m": (sana_1600m(), 32, said(300, 2304), sana),
    "lumina-image-2": (lumina_image_2(), 128, said(256, 2304), lumina2),
    "hidream-i1": (hidream_i1(), 128, said(128, 4096, 2048), hidream),
    "sd1.5": (sd15(), 64, said(77, 768), unet),
    "sdxl": (sdxl(), 128, said(77, 2048, 1280), unet),
    "uvit-h-2": (uvit_h_2(), 32, said(0, 0), uvit),
    "uvit-s-2-text": (uvit_s_2_text(), 32, said(77, 768), uvit),
    "simple-uvit-128": (simple_uvit_128(), 128, said(0, 0), simple_uvit),
}


def grouped_mm(tokens: torch.Size, weights: torch.Size, *rest: Any, **keywords: Any) -> int:
    """Every token meets the weights of one expert; torch does not count it."""
    return 2 * tokens.numel() * weights[-1]


def counted(config: Any, side: int, cond: Cond) -> int:
    """What torch counts."""
    with torch.device("meta"):
        net, x, t = config.build(), torch.randn(1, config.channels, side, side), torch.rand(1)
        if isinstance(config, HiDreamConfig):  # experts are counted in bfloat16 only
            net, x, cond = net.to(torch.bfloat16), x.bfloat16(), half(cond)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm})
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            assert net(x, t, cond).shape == x.shape
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_the_formulas(name: str) -> None:
    config, side, cond, formula = CASES[name]
    expected = formula(config, (side // config.patch) ** 2, cond.text.shape[1])
    assert counted(config, side, cond) == pytest.approx(expected, rel=0.005)


def test_dit_costs_what_the_paper_says() -> None:
    # Peebles & Xie 2023, table 4: 118.64 Gflops, which count a multiplication and its addition as one.
    assert counted(dit_xl_2(), 32, said(0, 0)) / 2e9 == pytest.approx(118.64, rel=0.01)
