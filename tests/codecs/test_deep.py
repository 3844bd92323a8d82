"""The deep-compression autoencoder of SANA against diffusers' AutoencoderDC."""

from typing import ClassVar

import pytest
import torch
from contract import Contract
from diffusers import AutoencoderDC
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from torch import Tensor
from torch.nn import functional as F

from mezzotint.codecs import deep
from mezzotint.codecs.deep import DeepConfig, Larger, Smaller, average, duplicate
from mezzotint.weights import Names
from mezzotint.weights import deep as names

# With heads of 4 channels some weights of linear attention sum to next to nothing, and rounding alone is 1e-5 of some gradients.
TINY = DeepConfig((8, 16, 16), (1, 1, 1), (1, 2, 1), attending=2, head=8, channels=4)


class TestDeep(Contract):
    configs: ClassVar = {
        "sana": TINY,
        "five levels": DeepConfig((4, 8, 8, 16, 16), (1, 1, 2, 1, 1), (1, 1, 1, 2, 1), attending=1, head=16, channels=8, scale=2.0),
        "one scale": TINY.replace(kernels=(), attending=3, channels=2),
    }
    presets: ClassVar = {"sana": (deep.sana, 312_250_275)}

    def peer(self, config: DeepConfig) -> AutoencoderDC:
        convs = len(config.widths) - config.attending
        kinds = ["ResBlock"] * convs + ["EfficientViTBlock"] * config.attending
        scales = [()] * convs + [config.kernels] * config.attending
        return AutoencoderDC(
            latent_channels=config.channels,
            attention_head_dim=config.head,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=config.widths,
            decoder_block_out_channels=config.widths,
            encoder_layers_per_block=config.encoder_depths,
            decoder_layers_per_block=config.decoder_depths,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=config.scale,
        )

    def encode(self, peer: AutoencoderDC, images: Tensor) -> Tensor:
        return peer.encode(images).latent

    def names(self, config: DeepConfig) -> dict[str, Names]:
        return {"diffusers": names.diffusers(config), "original": names.original(config)}

    def to_diffusers(self, form: str, state: dict[str, Tensor], config: DeepConfig) -> dict[str, Tensor]:
        return convert_autoencoder_dc_checkpoint_to_diffusers(state)


def test_shortcuts_carry_a_picture_down_and_up() -> None:
    # Without their convolutions the ways down and up only move numbers: a flat map stays flat, and a pixel reaches its own place.
    x = torch.randn(2, 4, 6, 8)
    down, up = Smaller(4, 16), Larger(16, 4)
    for layer in (down, up):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(up(down(x)), x)
    down = Smaller(4, 4)
    for parameter in down.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.allclose(down(x), F.avg_pool2d(x, 2), atol=1e-6)
    assert torch.equal(average(duplicate(x, 12), 4), average(x.repeat_interleave(3, 1), 4))


def test_sizes_that_do_not_fit_each_other_are_named() -> None:
    for change, message in (
        ({"encoder_depths": (1, 1)}, "encoder_depths must have one number for each of the 3 widths, got 2"),
        ({"decoder_depths": (1,) * 4}, "decoder_depths must have one number for each of the 3 widths, got 4"),
        ({"decoder_depths": (0, 1, 1)}, r"decoder_depths must be positive, got \(0, 1, 1\)"),
        ({"attending": 4}, "attending must be from 0 to the number of levels, 3, got 4"),
        ({"widths": (8, 12, 16)}, "each of the widths must divide four times the one before it, got 8 and 12"),
        ({"channels": 3}, "channels must divide the last of the widths, 16, got 3"),
        ({"head": 32}, "head must divide the widths of levels with attention, got 32"),
    ):
        with pytest.raises(ValueError, match=message):
            TINY.replace(**change).build()


def test_published_files_are_covered() -> None:
    # Names of every kind that the authors' file for SANA holds.
    with torch.device("meta"):
        state = names.original(deep.sana()).to_theirs(deep.sana().build().state_dict())
    assert {
        "encoder.project_in.conv.bias",
        "encoder.stages.0.op_list.2.main.conv.weight",
        "encoder.stages.3.op_list.0.context_module.main.aggreg.0.1.weight",
        "encoder.stages.5.op_list.2.local_module.main.point_conv.norm.bias",
        "decoder.stages.1.op_list.0.main.conv.conv.bias",
        "decoder.stages.0.op_list.3.main.conv2.norm.weight",
        "decoder.stages.5.op_list.2.context_module.main.proj.conv.weight",
        "decoder.project_out.0.weight",
        "decoder.project_out.2.conv.weight",
    } <= state.keys()
    assert state["decoder.stages.5.op_list.2.context_module.main.qkv.conv.weight"].shape == (3072, 1024, 1, 1)
