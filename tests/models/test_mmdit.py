"""MMDiT against diffusers' SD3Transformer2DModel, which has no masks: masked text must equal text that is not there."""

from typing import ClassVar

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from parity import EQUAL, Parity, distance
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.mmdit import MMDiTConfig, sd3_medium, sd35_large, sd35_medium
from mezzotint.weights import Names, mmdit

TINY = MMDiTConfig(width=32, depth=2, heads=4, channels=4, text_width=24, pooled_width=20, table=8, base=4)


class TestMMDiT(Parity):
    configs: ClassVar = {
        "sd3": TINY,
        "sd3.5-large": TINY.replace(qk_norm=True, depth=3, base=3),
        "sd3.5-medium": TINY.replace(qk_norm=True, depth=3, dual=2, table=7),
        "dual to the end": TINY.replace(dual=2, patch=4, table=5),
    }
    presets: ClassVar = {
        "sd3-medium": (sd3_medium, 2_028_328_000),
        "sd3.5-medium": (sd35_medium, 2_243_171_520),
        "sd3.5-large": (sd35_large, 8_056_627_520),
    }

    def peer(self, config: MMDiTConfig) -> nn.Module:
        return SD3Transformer2DModel(
            sample_size=config.base * config.patch,
            patch_size=config.patch,
            in_channels=config.channels,
            out_channels=config.channels,
            num_layers=config.depth,
            attention_head_dim=config.width // config.heads,
            num_attention_heads=config.heads,
            joint_attention_dim=config.text_width,
            caption_projection_dim=config.width,
            pooled_projection_dim=config.pooled_width,
            pos_embed_max_size=config.table,
            dual_attention_layers=tuple(range(config.dual)),
            qk_norm="rms_norm" if config.qk_norm else None,
        )

    def call(self, peer: SD3Transformer2DModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return peer(x, cond.text, cond.pooled, 1000 * t).sample

    def names(self, config: MMDiTConfig) -> Names:
        return mmdit.diffusers(config)

    def cond(self, config: MMDiTConfig, rows: int = 2) -> Cond:
        return Cond(torch.randn(rows, 5, config.text_width), None, torch.randn(rows, config.pooled_width))

    def roomy(self, config: MMDiTConfig) -> MMDiTConfig:
        return config.replace(table=16)

    def test_masked_text_equals_text_that_is_not_there(self, config: MMDiTConfig) -> None:
        ours, theirs = self.pair(config)
        x, t, cond = self.inputs(config, (8, 12))
        cond.mask = torch.tensor([[True, False, True, True, False], [True] * 5])
        for row in range(2):
            alone = Cond(cond.text[row : row + 1, cond.mask[row]], None, cond.pooled[row : row + 1])
            assert distance(ours(x, t, cond)[row], self.call(theirs, x[row : row + 1], t[row : row + 1], alone)[0]) <= EQUAL

    def test_original_names_are_those_that_diffusers_converts(self, config: MMDiTConfig) -> None:
        ours, _ = self.pair(config)
        originals = mmdit.original(config).to_theirs(ours.state_dict())
        back = mmdit.original(config).to_ours(originals)
        assert all(torch.equal(back[name], x) for name, x in ours.state_dict().items())
        expected = mmdit.diffusers(config).to_theirs(ours.state_dict())
        converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(originals))
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)

    def test_pictures_must_fit_into_the_table(self) -> None:
        with pytest.raises(ValueError, match="at most 8 patches of 2, got 4x9"):
            TINY.build()(torch.randn(1, 4, 8, 18), torch.rand(1), self.cond(TINY, 1))
        with pytest.raises(ValueError, match="one frame, got 3 frames"):
            TINY.build()(torch.randn(1, 4, 3, 8, 8), torch.rand(1), self.cond(TINY, 1))
