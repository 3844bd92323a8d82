"""The UNets of Stable Diffusion against diffusers' UNet2DConditionModel, masks of text included."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from parity import Parity, distance
from torch import Tensor, nn

from mezzotint.flow.path import from_discrete, scaled_linear_table
from mezzotint.models import Cond
from mezzotint.models.blocks import ResBlock
from mezzotint.models.unet import SpatialTransformer, UNetConfig, sd15, sdxl
from mezzotint.weights import Names, unet

TINY = UNetConfig(widths=(8, 16, 16), depths=(1, 1, 0), heads=(2, 4, 4), groups=4, text_width=12)
XL = TINY.replace(widths=(8, 16), depths=(0, 2), middle=2, heads=(1, 2), pooled_width=20, linear=True)


def described(config: UNetConfig) -> dict[str, Any]:
    """The configuration in diffusers' words, as far as its converter of single files reads it."""
    return {"layers_per_block": config.layers, "addition_embed_type": "text_time" if config.pooled_width else None}


class TestUNet(Parity):
    identity = False
    sizes: ClassVar = [(8, 8), (8, 12), (7, 5)]
    configs: ClassVar = {
        "sd1.5": TINY,
        "sdxl": XL,
        "four levels": TINY.replace(widths=(8, 8, 16, 16), depths=(2, 0, 1, 1), heads=(1, 2, 4, 2), layers=1, middle=1),
        "sdxl, three levels": XL.replace(widths=(8, 16, 24), depths=(0, 1, 2), heads=(2, 4, 3), layers=1, groups=2, channels=3),
    }
    presets: ClassVar = {"sd1.5": (sd15, 859_520_964), "sdxl": (sdxl, 2_567_463_684)}

    def peer(self, config: UNetConfig) -> nn.Module:
        assert config.middle == (config.depths[-1] or 1)  # they know no other
        return UNet2DConditionModel(
            in_channels=config.channels,
            out_channels=config.channels,
            down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths],
            up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)],
            block_out_channels=config.widths,
            norm_num_groups=config.groups,
            cross_attention_dim=config.text_width,
            transformer_layers_per_block=[depth or 1 for depth in config.depths],
            attention_head_dim=config.heads,
            use_linear_projection=config.linear,
            addition_time_embed_dim=256 if config.pooled_width else None,
            projection_class_embeddings_input_dim=config.pooled_width + 6 * 256 if config.pooled_width else None,
            **described(config),
        )

    def call(self, peer: UNet2DConditionModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = None
        if cond.size is not None and cond.origin is not None:
            told = {"text_embeds": cond.pooled, "time_ids": torch.cat([cond.origin, cond.size], dim=1)}
        mask = None if cond.mask is None else cond.mask.long()
        return peer(x, 1000 * t, cond.text, encoder_attention_mask=mask, added_cond_kwargs=told).sample

    def names(self, config: UNetConfig) -> Names:
        return unet.diffusers(config)

    def cond(self, config: UNetConfig, rows: int = 2) -> Cond:
        mask = torch.arange(5) < torch.randint(1, 6, (rows, 1))
        cond = Cond(torch.randn(rows, 5, config.text_width), mask, torch.randn(rows, config.pooled_width))
        if config.pooled_width:
            cond.size = torch.randint(32, 128, (rows, 2)).float()
            cond.origin = torch.randint(0, 256, (rows, 4)).float()
        return cond

    @pytest.fixture(autouse=True)
    def a_graph_for_each_block(self) -> Iterator[None]:
        """Nearly each has shapes of its own: torch would stop at 8, and look for what they have in common."""
        with torch._dynamo.config.patch(recompile_limit=64, automatic_dynamic_shapes=False):
            yield

    def test_without_a_mask_all_text_is_read(self, config: UNetConfig) -> None:
        ours, theirs = self.pair(config)
        x, t, cond = self.inputs(config, (8, 12))
        cond.mask = None
        assert distance(ours(x, t, cond), self.call(theirs, x, t, cond)) <= 1e-5

    def test_original_names_are_those_that_diffusers_converts(self, config: UNetConfig) -> None:
        ours, _ = self.pair(config)
        originals = unet.original(config).to_theirs(ours.state_dict())
        back = unet.original(config).to_ours(originals)
        assert all(torch.equal(back[name], x) for name, x in ours.state_dict().items())
        expected = unet.diffusers(config).to_theirs(ours.state_dict())
        prefixed = {f"model.diffusion_model.{name}": x for name, x in originals.items()}
        converted = convert_ldm_unet_checkpoint(prefixed, described(config))
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)

    def test_its_time_is_the_index_on_its_path_over_a_thousand(self, config: UNetConfig) -> None:
        # Ours on the linear path, at the time of an index, sees the data that theirs sees at that index.
        ours, theirs = self.pair(config)
        x, _, cond = self.inputs(config, (8, 8))
        table = scaled_linear_table()
        denoise = from_discrete(lambda x, i: ours(x, i / 1000, cond), table, config.prediction)
        for i in (0, 1, 500, 999):
            a, b = table[i].sqrt().float(), (1 - table[i]).sqrt().float()
            t = (b / (a + b)).expand(2)
            with torch.no_grad():
                eps = self.call(theirs, x, torch.full((2,), i / 1000), cond)
                data = x / (a + b) - t[0] * denoise(x / (a + b), t)
            assert distance(data, (x - b * eps) / a) <= 1e-5

    def test_what_the_network_is_told_must_be_given(self) -> None:
        x, t, cond = self.inputs(XL, (8, 8))
        cond.size = None
        with pytest.raises(ValueError, match="size must be given"):
            XL.build()(x, t, cond)
        with pytest.raises(ValueError, match="depths and heads must have one number for each of the 2 widths"):
            XL.replace(heads=(2,)).build()
        with pytest.raises(ValueError, match="one frame, got 3 frames"):
            TINY.build()(torch.randn(1, 4, 3, 8, 8), torch.rand(1), self.cond(TINY, 1))

    def test_a_picture_without_an_origin_is_whole(self) -> None:
        ours, _ = self.pair(XL)
        x, t, cond = self.inputs(XL, (8, 8))
        assert cond.size is not None
        out = ours(x, t, cond)
        cond.origin = torch.cat([cond.size, torch.zeros(2, 2)], dim=1)
        whole = ours(x, t, cond)
        assert distance(whole, out) > 1e-3
        cond.origin = None
        assert torch.equal(ours(x, t, cond), whole)


def test_at_first_blocks_add_nothing() -> None:
    x, text = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 12)
    assert torch.equal(ResBlock(8, 8, 32, 4)(x, torch.randn(2, 32)), x)
    assert torch.equal(SpatialTransformer(8, 2, 2, 12, 4)(x, text), x)


def test_published_single_files_are_covered() -> None:
    # The names of every kind that the whole files of SD 1.5 and SDXL hold.
    for config, some in (
        (sd15(), ("input_blocks.11.0.in_layers.0.weight", "output_blocks.2.1.conv.weight", "middle_block.2.out_layers.3.bias")),
        (sdxl(), ("label_emb.0.2.bias", "input_blocks.8.1.transformer_blocks.9.ff.net.2.weight", "output_blocks.5.2.conv.weight")),
    ):
        with torch.device("meta"):
            ours = config.build().state_dict()
        theirs = unet.original(config).to_theirs(ours)
        assert set(some) <= theirs.keys()
        back = unet.original(config).to_ours(theirs)
        assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in ours.items()}
