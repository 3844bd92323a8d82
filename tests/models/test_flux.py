"""FLUX against diffusers' FluxTransformer2DModel, which has no masks: masked text must equal text that is not there."""

from typing import ClassVar

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from parity import EQUAL, Parity, distance
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.flux import FluxConfig, flux_control, flux_dev, flux_fill, flux_schnell
from mezzotint.weights import Names, flux

TINY = FluxConfig(width=32, joint=2, single=2, heads=2, axes=(4, 6, 6), channels=4, text_width=24, pooled_width=20)


def pack(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p W/p, C p p), channels first within a patch."""
    return nn.functional.unfold(x, p, stride=p).mT


class TestFlux(Parity):
    configs: ClassVar = {
        "dev": TINY,
        "schnell": TINY.replace(guidance=False, joint=1, single=3),
        "control": TINY.replace(control=4, heads=4, axes=(2, 2, 4)),
        "fill": TINY.replace(control=20, patch=4),
    }
    presets: ClassVar = {
        "dev": (flux_dev, 11_901_408_320),
        "schnell": (flux_schnell, 11_891_178_560),
        "control": (flux_control, 11_901_604_928),
        "fill": (flux_fill, 11_902_391_360),
    }

    def peer(self, config: FluxConfig) -> nn.Module:
        return FluxTransformer2DModel(
            in_channels=config.patch**2 * (config.channels + config.control),
            out_channels=config.patch**2 * config.channels,
            num_layers=config.joint,
            num_single_layers=config.single,
            attention_head_dim=config.width // config.heads,
            num_attention_heads=config.heads,
            joint_attention_dim=config.text_width,
            pooled_projection_dim=config.pooled_width,
            guidance_embeds=config.guidance,
            axes_dims_rope=config.axes,
        )

    def call(self, peer: FluxTransformer2DModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = int((peer.config.out_channels / x.shape[1]) ** 0.5)
        rows, columns = x.shape[2] // p, x.shape[3] // p
        parts = [pack(part, p) for part in (x, cond.control) if part is not None]
        ids = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (1, rows, columns)))
        packed = peer(
            torch.cat(parts, dim=2),
            cond.text,
            cond.pooled,
            t,
            img_ids=ids,
            txt_ids=ids.new_zeros(cond.text.shape[1], 3),
            guidance=cond.guidance,
        ).sample
        return nn.functional.fold(packed.mT, x.shape[2:], p, stride=p)

    def names(self, config: FluxConfig) -> Names:
        return flux.diffusers(config)

    def cond(self, config: FluxConfig, rows: int = 2) -> Cond:
        cond = Cond(torch.randn(rows, 5, config.text_width), None, torch.randn(rows, config.pooled_width))
        cond.guidance = 1 + 4 * torch.rand(rows) if config.guidance else None
        return cond

    def inputs(self, config: FluxConfig, size: tuple[int, int], rows: int = 2) -> tuple[Tensor, Tensor, Cond]:
        x, t, cond = super().inputs(config, size, rows)
        cond.control = torch.randn(rows, config.control, *size) if config.control else None
        return x, t, cond

    def test_masked_text_equals_text_that_is_not_there(self, config: FluxConfig) -> None:
        ours, theirs = self.pair(config)
        x, t, cond = self.inputs(config, (8, 12))
        cond.mask = torch.tensor([[True, False, True, True, False], [True] * 5])
        out = ours(x, t, cond)
        for row in range(2):
            alone = cond.index(slice(row, row + 1))
            alone.text = alone.text[:, cond.mask[row]]
            assert distance(out[row], self.call(theirs, x[row : row + 1], t[row : row + 1], alone)[0]) <= EQUAL

    def test_original_names_go_both_ways(self, config: FluxConfig) -> None:
        ours, _ = self.pair(config)
        originals = flux.original(config).to_theirs(ours.state_dict())
        back = flux.original(config).to_ours(originals)
        assert all(torch.equal(back[name], x) for name, x in ours.state_dict().items())

    def test_original_names_are_those_that_diffusers_converts(self) -> None:
        # The converter knows the published width only; so that this stays small, every layer has one column, and its bias's rows.
        config = flux_dev().replace(joint=2, single=2)
        with torch.device("meta"):
            shapes = config.build().state_dict()
        state = {name: torch.randn(len(x), *(1 for _ in x.shape[1:])) for name, x in shapes.items()}
        state["embed_patch.weight"] = torch.randn(8, 64)
        originals = flux.original(config).to_theirs(state)
        expected = flux.diffusers(config).to_theirs(state)
        converted = convert_flux_transformer_checkpoint_to_diffusers(dict(originals))
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)

    def test_what_the_network_needs_must_be_given(self) -> None:
        x, t, cond = self.inputs(TINY, (4, 4))
        cond.guidance = None
        with pytest.raises(ValueError, match="guidance must be given"):
            TINY.build()(x, t, cond)
        with pytest.raises(ValueError, match="control must have 4 channels, got 0"):
            TINY.replace(control=4).build()(x, t, cond)
        with pytest.raises(ValueError, match="axes must add up to the channels of a head, 32 / 2"):
            TINY.replace(axes=(4, 4, 4)).build()

    def test_frames_have_their_place(self) -> None:
        ours, _ = self.pair(TINY)
        _, t, cond = self.inputs(TINY, (4, 4))
        x = torch.randn(2, 4, 3, 4, 4)
        assert distance(ours(x.flip(2), t, cond).flip(2), ours(x, t, cond)) > 1e-2
