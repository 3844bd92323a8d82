"""Lumina 2 against diffusers' Lumina2Transformer2DModel, texts of unlike lengths included."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from diffusers import Lumina2Transformer2DModel
from parity import EQUAL, Parity, distance
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.lumina2 import Lumina2Config, lumina_image_2
from mezzotint.weights import Names, lumina2

TINY = Lumina2Config(
    width=48, refiners=2, depth=2, heads=4, kv_heads=2, axes=(4, 4, 4), hidden=192, channels=4, time_width=48, text_width=20
)


class TestLumina2(Parity):
    identity = False
    configs: ClassVar = {
        "lumina": TINY,
        "one key head": TINY.replace(kv_heads=1, depth=3, refiners=1, hidden=256),
        "a key head for each": TINY.replace(kv_heads=4, patch=4, axes=(2, 4, 6)),
    }
    presets: ClassVar = {"lumina-image-2": (lumina_image_2, 2_609_769_152)}

    def peer(self, config: Lumina2Config) -> nn.Module:
        return Lumina2Transformer2DModel(
            patch_size=config.patch,
            in_channels=config.channels,
            hidden_size=config.width,
            num_layers=config.depth,
            num_refiner_layers=config.refiners,
            num_attention_heads=config.heads,
            num_kv_heads=config.kv_heads,
            multiple_of=config.hidden,  # to which the hidden width, 4 D, is rounded up
            axes_dim_rope=config.axes,
            cap_feat_dim=config.text_width,
        )

    def call(self, peer: Lumina2Transformer2DModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return -peer(x, 1 - t, cond.text, cond.masked().mask.long()).sample

    def names(self, config: Lumina2Config) -> Names:
        return lumina2.diffusers(config)

    def cond(self, config: Lumina2Config, rows: int = 2) -> Cond:
        mask = torch.arange(5) < torch.randint(1, 6, (rows, 1))
        return Cond(torch.randn(rows, 5, config.text_width), mask, torch.zeros(rows, 0))

    def test_where_the_padding_stands_does_not_matter(self, config: Lumina2Config) -> None:
        ours, _ = self.pair(config)
        x, t, cond = self.inputs(config, (8, 12))
        cond.mask = torch.tensor([[True, True, True, False, False]] * 2)
        out, order = ours(x, t, cond), torch.tensor([3, 0, 1, 4, 2])
        assert distance(ours(x, t, replace(cond, text=cond.text[:, order], mask=cond.mask[:, order])), out) <= EQUAL

    def test_joint_blocks_start_as_identities(self) -> None:
        net = TINY.build()
        tokens, c = torch.randn(2, 7, 48), torch.randn(2, 48)
        rotation = torch.ones(7, 6, 2)
        for block in (*net.joint, *net.image_refiner):
            assert torch.equal(block(tokens, rotation, None, c), tokens)
        assert not torch.allclose(net.text_refiner[0](tokens, rotation, None), tokens, atol=1e-3)

    def test_axes_must_fill_a_head(self) -> None:
        with pytest.raises(ValueError, match="axes must add up to the channels of a head, 48 / 4"):
            TINY.replace(axes=(4, 4, 8)).build()
