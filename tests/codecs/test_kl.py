"""The KL autoencoder of Stable Diffusion and FLUX against diffusers' AutoencoderKL."""

import math
from typing import Any, ClassVar

import torch
from contract import Contract
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from models.parity import EQUAL, distance
from torch import Tensor

from mezzotint.codecs import kl
from mezzotint.codecs.kl import Down, KLConfig, MapAttention
from mezzotint.models.blocks import ResBlock
from mezzotint.weights import Names
from mezzotint.weights import kl as names

TINY = KLConfig(widths=(8, 16, 16), layers=1, groups=4)


class TestKL(Contract):
    configs: ClassVar = {
        "sd1.5": TINY,
        "flux": TINY.replace(widths=(8, 16, 24, 24), layers=2, channels=6, quant=False, scale=0.3611, shift=0.1159),
        "no attention": TINY.replace(widths=(16, 8), groups=2, attention=False, scale=2.0, shift=-0.5),
    }
    presets: ClassVar = {
        "sd1.5": (kl.sd15, 83_653_863),
        "sdxl": (kl.sdxl, 83_653_863),
        "sd3": (kl.sd3, 83_819_683),
        "flux": (kl.flux, 83_819_683),
    }

    def peer(self, config: KLConfig) -> AutoencoderKL:
        levels = len(config.widths)
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=config.widths,
            layers_per_block=config.layers,
            latent_channels=config.channels,
            norm_num_groups=config.groups,
            use_quant_conv=config.quant,
            use_post_quant_conv=config.quant,
            mid_block_add_attention=config.attention,
        )

    def encode(self, peer: AutoencoderKL, images: Tensor) -> Tensor:
        return peer.encode(images).latent_dist.mode()

    def names(self, config: KLConfig) -> dict[str, Names]:
        return {"diffusers": names.diffusers(config), "old": names.diffusers_old(config), "original": names.original(config)}

    def to_diffusers(self, form: str, state: dict[str, Tensor], config: KLConfig) -> dict[str, Tensor]:
        if form == "old":
            self.peer(config)._fix_state_dict_keys_on_load(state)
            return state
        prefixed = {f"first_stage_model.{name}": x for name, x in state.items()}
        return convert_ldm_vae_checkpoint(prefixed, {key: [None] * len(config.widths) for key in ("down_block_types", "up_block_types")})

    def test_the_posterior_is_theirs(self, config: KLConfig) -> None:
        ours, theirs = self.pair(config)
        images = self.images(config, (2, 3))
        with torch.no_grad():
            for size in (1.0, 1e4):  # beyond the range of the log-variance, too
                head = theirs.quant_conv if config.quant else theirs.encoder.conv_out
                head.weight.mul_(size)
                ours.load_state_dict(names.diffusers(config).to_ours(theirs.state_dict()))
                mean, logvar = ours.posterior(images)
                expected = theirs.encode(images).latent_dist
                assert torch.equal(mean, ours.encode(images))
                assert distance(mean, (expected.mean - config.shift) * config.scale) <= EQUAL
                assert distance(logvar, expected.logvar + 2 * math.log(config.scale)) <= EQUAL
        assert expected.logvar.min() == -30
        assert expected.logvar.max() == 20


def test_at_first_blocks_add_nothing() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResBlock(8, 8, 0, 4)(x), x)
    assert torch.equal(MapAttention(8, 4)(x), x)


def test_maps_are_padded_on_the_right_and_below_only() -> None:
    # With a kernel of ones, a corner's sum counts the places that it sees: 3 x 3 above left, 2 x 2 below right.
    down = Down(4, 4, 1, 2)
    torch.nn.init.constant_(down.smaller.weight, 1 / 4)
    torch.nn.init.zeros_(down.smaller.bias)
    out: Any = down(torch.ones(1, 4, 8, 8))
    assert out[0, 0, 0, 0] == 9
    assert out[0, 0, -1, -1] == 4


def test_published_single_files_are_covered() -> None:
    # Names of every kind that files of SD 1.5, and FLUX's ae, hold.
    quant = {"quant_conv.weight", "post_quant_conv.bias"}
    some = {
        "encoder.down.2.downsample.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.q.weight",
        "encoder.mid.block_2.conv2.bias",
        "encoder.norm_out.weight",
        "decoder.up.3.upsample.conv.weight",
        "decoder.up.0.block.0.nin_shortcut.bias",
        "decoder.up.1.block.2.norm1.weight",
        "decoder.mid.attn_1.proj_out.weight",
        "decoder.conv_in.weight",
    }
    for config, expected in ((kl.sd15(), some | quant), (kl.flux(), some)):
        with torch.device("meta"):
            state = names.original(config).to_theirs(config.build().state_dict())
        assert expected <= state.keys()
        assert config.quant == (quant <= state.keys())
        assert state["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
        assert "decoder.up.0.upsample.conv.weight" not in state
