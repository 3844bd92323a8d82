"""PixArt against diffusers' PixArtTransformer2DModel, masks of text included."""

from typing import ClassVar

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from parity import EQUAL, Parity, distance, scatter
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.class_dit import ClassDiTConfig
from mezzotint.models.pixart import PixArtConfig, pixart_alpha_256, pixart_alpha_512, pixart_alpha_1024, pixart_sigma, start_from
from mezzotint.weights import Names, pixart

TINY = PixArtConfig(width=24, depth=2, heads=3, text_width=20, span=4.0)


class TestPixArt(Parity):
    identity = False
    configs: ClassVar = {
        "alpha-1024": TINY,
        "sigma": TINY.replace(size=False, width=32, heads=2, depth=3, span=2.0),
        "without variance": TINY.replace(variance=False, patch=4, span=1.0, channels=3),
    }
    presets: ClassVar = {
        "alpha-1024": (pixart_alpha_1024, 611_349_152),
        "alpha-512": (pixart_alpha_512, 610_856_096),
        "alpha-256": (pixart_alpha_256, 610_856_096),
        "sigma": (pixart_sigma, 610_856_096),
    }

    def peer(self, config: PixArtConfig) -> nn.Module:
        return PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=config.channels,
            out_channels=(2 if config.variance else 1) * config.channels,
            num_layers=config.depth,
            cross_attention_dim=config.width,
            sample_size=int(config.span) * config.patch,
            patch_size=config.patch,
            interpolation_scale=1,
            use_additional_conditions=config.size,
            caption_channels=config.text_width,
        )

    def call(self, peer: PixArtTransformer2DModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = {"resolution": None, "aspect_ratio": None}
        if cond.size is not None:
            told = {"resolution": cond.size, "aspect_ratio": cond.size[:, :1] / cond.size[:, 1:]}
        mask = None if cond.mask is None else cond.mask.long()
        out = peer(x, encoder_hidden_states=cond.text, timestep=1000 * t, added_cond_kwargs=told, encoder_attention_mask=mask).sample
        return out[:, : x.shape[1]]

    def names(self, config: PixArtConfig) -> Names:
        return pixart.diffusers(config)

    def cond(self, config: PixArtConfig, rows: int = 2) -> Cond:
        mask = torch.arange(5) < torch.randint(1, 6, (rows, 1))
        size = torch.randint(32, 128, (rows, 2)).float() if config.size else None
        return Cond(torch.randn(rows, 5, config.text_width), mask, torch.zeros(rows, 0), size=size)

    def test_without_its_variance_the_head_is_the_published_one(self) -> None:
        # The first channels of every patch are the noise, the others the variance.
        ours, theirs = self.pair(TINY)
        x, t, cond = self.inputs(TINY, (8, 8))
        with torch.no_grad():
            theirs.proj_out.weight.unflatten(0, (4, 2, 4))[:, 1] = 0
            theirs.proj_out.bias.unflatten(0, (4, 2, 4))[:, 1] = 0
        assert torch.allclose(ours(x, t, cond), self.call(theirs, x, t, cond), atol=1e-5)

    def test_a_dit_without_a_class_is_a_start(self) -> None:
        config = TINY.replace(size=False)
        dit = scatter(ClassDiTConfig(width=24, depth=2, heads=3, span=4.0, classes=5).build())
        nn.init.zeros_(dit.embed_label.weight)
        net = config.build()
        start_from(net, dit)
        x, _, cond = self.inputs(config, (8, 12))
        for time, same in ((0.5, True), (0.9, False)):
            t = torch.full((2,), time)
            expected = dit(x, t, Cond.of_classes(torch.tensor([3, -1])))
            assert (distance(net(x, t, cond), expected) <= EQUAL) == same
        with pytest.raises(ValueError, match="heads must be the DiT's, 3, got 2"):
            start_from(config.replace(heads=2).build(), dit)

    def test_the_size_must_be_told(self) -> None:
        x, t, cond = self.inputs(TINY, (8, 8))
        cond.size = None
        with pytest.raises(ValueError, match="size must be given"):
            TINY.build()(x, t, cond)

    def test_cross_attention_starts_at_nothing(self) -> None:
        net = TINY.build()
        nn.init.normal_(net.head.linear.weight)
        x, t, cond = self.inputs(TINY, (8, 8))
        assert torch.equal(net(x, t, cond), net(x, t, cond.null()))
