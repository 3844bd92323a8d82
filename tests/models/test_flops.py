"""What a forward pass costs: torch's count against the closed formula of each architecture, within half a percent.

The networks are the published ones at the size of picture that they were made for, on the meta device, where nothing is computed.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import half
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.models import Cond, DiTConfig
from mezzotint.models.class_dit import dit_xl_2
from mezzotint.models.cost import FORMULAS, flops
from mezzotint.models.dit_air import DiTAirConfig
from mezzotint.models.flux import flux_dev
from mezzotint.models.fuse_dit import fuse_dit_2b
from mezzotint.models.hidream import HiDreamConfig, hidream_i1
from mezzotint.models.lumina2 import lumina_image_2
from mezzotint.models.mmdit import sd3_medium, sd35_medium
from mezzotint.models.pixart import pixart_alpha_1024
from mezzotint.models.sana import sana_1600m
from mezzotint.models.simple_uvit import simple_uvit_128
from mezzotint.models.transfusion import transfusion_370m
from mezzotint.models.unet import sd15, sdxl
from mezzotint.models.uvit import uvit_h_2, uvit_s_2_text
from mezzotint.text import ByteEncoderConfig


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
            tokens=torch.zeros(1, text, dtype=torch.int64),
        )


def fused(text: int) -> Cond:
    """Keys and values of Gemma 2 2B."""
    cond = said(text, 2048)
    assert cond.states is not None
    return replace(cond, states=cond.states[:, :26])


# The network, the side of x, the conditions.
CASES: dict[str, tuple[Any, int, Cond]] = {
    "dit": (DiTConfig(width=512, depth=8, heads=8, patch=2, channels=4, text_width=512), 32, said(64, 512, 512)),
    "dit-xl-2": (dit_xl_2(), 32, said(0, 0)),
    "dit-air": (DiTAirConfig(), 128, said(333, 4096, 2048)),
    "sd3-medium": (sd3_medium(), 128, said(333, 4096, 2048)),
    "sd3.5-medium": (sd35_medium(), 128, said(333, 4096, 2048)),
    "flux-dev": (flux_dev(), 128, said(512, 4096, 768)),
    "pixart-alpha-1024": (pixart_alpha_1024(), 128, said(120, 4096)),
    "sana-1600m": (sana_1600m(), 32, said(300, 2304)),
    "lumina-image-2": (lumina_image_2(), 128, said(256, 2304)),
    "hidream-i1": (hidream_i1(), 128, said(128, 4096, 2048)),
    "sd1.5": (sd15(), 64, said(77, 768)),
    "sdxl": (sdxl(), 128, said(77, 2048, 1280)),
    "uvit-h-2": (uvit_h_2(), 32, said(0, 0)),
    "uvit-s-2-text": (uvit_s_2_text(), 32, said(77, 768)),
    "simple-uvit-128": (simple_uvit_128(), 128, said(0, 0)),
    "transfusion-370m": (transfusion_370m(), 128, said(64, 0)),
    "fuse-dit-2b": (fuse_dit_2b(), 64, fused(256)),
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
    config, side, cond = CASES[name]
    expected = flops(config, (side // config.patch) ** 2, cond.text.shape[1])
    assert counted(config, side, cond) == pytest.approx(expected, rel=0.005)


def test_every_architecture_is_counted() -> None:
    assert {type(config) for config, *_ in CASES.values()} == FORMULAS.keys()
    with pytest.raises(ValueError, match="config must be that of a network, got ByteEncoderConfig"):
        flops(ByteEncoderConfig(), 1, 1)


def test_dit_costs_what_the_paper_says() -> None:
    # Peebles & Xie 2023, table 4: 118.64 Gflops, which count a multiplication and its addition as one.
    assert counted(dit_xl_2(), 32, said(0, 0)) / 2e9 == pytest.approx(118.64, rel=0.01)
