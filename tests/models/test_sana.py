"""SANA against diffusers' SanaTransformer2DModel, masks of text included."""

from typing import ClassVar

import torch
from diffusers import SanaTransformer2DModel
from parity import Parity
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.sana import LinearAttention, SanaConfig, sana15_1600m, sana15_4800m, sana_600m, sana_1600m
from mezzotint.weights import Names, sana

TINY = SanaConfig(width=32, depth=2, heads=4, cross_heads=2, channels=6, text_width=20)


class TestSana(Parity):
    identity = False
    configs: ClassVar = {
        "sana": TINY,
        "sana1.5": TINY.replace(qk_norm=True, depth=3),
        "patches": TINY.replace(patch=2, heads=2, cross_heads=8, ratio=1.5),
    }
    presets: ClassVar = {
        "1600m": (sana_1600m, 1_604_462_752),
        "600m": (sana_600m, 591_747_872),
        "1.5-1600m": (sana15_1600m, 1_604_641_952),
        "1.5-4800m": (sana15_4800m, 4_721_825_952),
    }

    def peer(self, config: SanaConfig) -> nn.Module:
        return SanaTransformer2DModel(
            in_channels=config.channels,
            out_channels=config.channels,
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            num_layers=config.depth,
            num_cross_attention_heads=config.cross_heads,
            cross_attention_head_dim=config.width // config.cross_heads,
            cross_attention_dim=config.width,
            caption_channels=config.text_width,
            mlp_ratio=config.ratio,
            patch_size=config.patch,
            qk_norm="rms_norm_across_heads" if config.qk_norm else None,
        )

    def call(self, peer: SanaTransformer2DModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mask = None if cond.mask is None else cond.mask.long()
        return peer(x, cond.text, 1000 * t, encoder_attention_mask=mask).sample

    def names(self, config: SanaConfig) -> Names:
        return sana.diffusers(config)

    def cond(self, config: SanaConfig, rows: int = 2) -> Cond:
        mask = torch.arange(5) < torch.randint(1, 6, (rows, 1))
        return Cond(torch.randn(rows, 5, config.text_width), mask, torch.zeros(rows, 0))


def test_linear_attention_is_attention_with_another_kernel() -> None:
    net, x = LinearAttention(16, 2), torch.randn(2, 9, 16)
    q, k, v = net.qkv(x)
    weights = q.relu() @ k.relu().mT
    attended = (weights / weights.sum(-1, keepdim=True)) @ v
    assert torch.allclose(net(x), net.out(attended.transpose(1, 2).flatten(2)), atol=1e-5)


def test_only_neighbours_know_each_other_by_place() -> None:
    # Without positions, attention sees a set; what the depthwise convolutions reach is what order there is.
    net = TINY.build().eval()
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        for block in net.blocks:
            block.mlp.depthwise.weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # a 1 x 1 convolution is left
    x, t, cond = torch.randn(2, 6, 4, 6), torch.rand(2), TestSana().cond(TINY)
    order = torch.randperm(24)
    shuffled = x.flatten(2)[..., order].unflatten(2, (4, 6))
    assert torch.allclose(net(shuffled, t, cond).flatten(2), net(x, t, cond).flatten(2)[..., order], atol=1e-5)
