"""What attention costs in memory, up to the 65,536 tokens of a picture of 4096 pixels: on the meta device where nothing could hold it."""

import runpy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Largest
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint.models.attention import attend
from mezzotint.models.embed import image_positions, rope
from mezzotint.models.flux import SingleBlock, flux_dev
from mezzotint.models.sana import SanaBlock, sana_1600m

DRAWN = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "draw_architectures.py"))
kept: Callable[..., int] = DRAWN["kept"]


def test_linear_attention_grows_with_the_tokens() -> None:
    with torch.device("meta"):
        block = SanaBlock(sana_1600m()).to(torch.bfloat16)
    made, held = {}, {}
    for side in (64, 128, 256):
        x, c, text = (torch.empty(1, n, 2240, dtype=torch.bfloat16, device="meta") for n in (side**2, 6, 300))
        with torch.no_grad(), Largest(block) as largest:
            block(x, c, text, None, side, side)
        made[side**2] = largest.bytes
        held[side**2] = kept(lambda x=x, c=c, text=text, side=side: block(x, c, text, None, side, side), [*block.parameters(), x, text])
    assert list(made) == [4096, 16_384, 65_536]
    for memory in (made, held):
        a_token = memory[65_536] / 65_536
        assert all(size / tokens == pytest.approx(a_token, rel=0.02) for tokens, size in memory.items())


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_is_not_materialised(kv_heads: int, masked: bool) -> None:
    """Here on the CPU, with everything allocated; and the measures see it where torch is asked to materialise it."""
    tokens, head = 2048, 8
    q, k, v = (torch.randn(1, heads, tokens, head, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    mask = torch.rand(1, tokens) > 0.5 if masked else None
    matrix, stream = 4 * tokens**2 * 4, 4 * tokens * head * 4  # bytes of four heads
    for way, materialised in ((nullcontext(), False), (sdpa_kernel(SDPBackend.MATH), True)):
        with way:
            with torch.no_grad(), Largest(nn.Module()) as largest:
                attend(q, k, v, mask)
            held = kept(lambda: attend(q, k, v, mask), [])
        assert (largest.bytes >= matrix) == materialised
        assert (held >= matrix) == materialised
        assert materialised or max(largest.bytes, held / 5) <= stream


def test_the_fields_estimate_for_4k() -> None:
    """Scores of 24 heads over 65,536 tokens in 16 bits are 206 GB, 192 GiB; FLUX, which has them, never makes them."""
    tokens = (4096 // 8 // 2) ** 2
    assert tokens == 65_536
    assert round(24 * tokens**2 * 2 / 1e9) == 206
    assert 24 * tokens**2 * 2 / 2**30 == 192
    config = flux_dev()
    with torch.device("meta"):
        block, whole = SingleBlock(config.width, config.heads), tokens + 512
        inputs: Any = (torch.empty(1, whole, config.width), torch.empty(1, config.width), rope(image_positions(1, whole, 1), config.axes))
    scores = {}
    for name, way in (("naive", sdpa_kernel(SDPBackend.MATH)), ("fused", DRAWN["fused"]())):
        with way, torch.no_grad(), Largest(block) as largest:
            block(*inputs)
        scores[name] = largest.bytes // 4  # numbers in float32
    assert scores["naive"] == config.heads * whole**2
    assert scores["fused"] == whole * 7 * config.width  # queries, keys, values, and the MLP's hidden layer
