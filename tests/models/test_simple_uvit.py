"""The U-ViT of simple diffusion against its formulas, written down apart; nobody publishes its code or weights."""

from typing import ClassVar

import pytest
import torch
from formulas import Paper, attended, convolved, gelu, group_norm, layer_norm, linear, plain_attention, same_names, silu
from parity import Parity, count
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.embed import resample, sinusoid
from mezzotint.models.simple_uvit import (
    FilmResBlock,
    SimpleUViTBlock,
    SimpleUViTConfig,
    simple_uvit_128,
    simple_uvit_256,
    simple_uvit_512,
)
from mezzotint.weights import Names

TINY = SimpleUViTConfig(
    widths=(8, 12), layers=1, width=16, depth=2, heads=2, dropout=0.0, side=2, condition=20, groups=4, patch=2, classes=5
)


class PaperSimpleUViT(Paper):
    """Hoogeboom et al. 2023, section 3.5, at sizes that every level halves."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        w, config = self.weights, self.config
        p, (height, width) = config.patch, x.shape[2:]
        c = linear(silu(linear(sinusoid(1000 * t, 256), w, "embed_time.mlp.0")), w, "embed_time.mlp.2")
        if config.classes:
            c = c + w["embed_label.weight"][cond.label]
        h = x.reshape(len(x), -1, height // p, p, width // p, p).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        h, maps = convolved(h, w, "embed_picture"), []
        for level in range(len(config.widths)):
            for i in range(config.layers):
                h = self.residual(h, c, f"down.{level}.blocks.{i}")
                maps.append(h)
            h = convolved(h, w, f"down.{level}.smaller", stride=2)
        rows, columns = h.shape[2:]
        tokens = h.flatten(2).mT + resample(w["positions"], rows, columns)
        for i in range(config.depth):
            tokens = self.block(tokens, c, cond, f"transformer.{i}")
        h = tokens.mT.unflatten(2, (rows, columns))
        for level in range(len(config.widths)):
            to = maps[-1].shape[2:]
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            assert h.shape[2:] == to
            h = convolved(h, w, f"up.{level}.larger")
            for i in range(config.layers):
                h = self.residual(torch.cat([h, maps.pop()], dim=1), c, f"up.{level}.blocks.{i}")
        out = convolved(silu(group_norm(h, w, "norm", config.groups)), w, "head")
        return out.unflatten(1, (-1, p, p)).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)

    def residual(self, x: Tensor, c: Tensor, name: str) -> Tensor:
        w, groups = self.weights, self.config.groups
        h = convolved(silu(group_norm(x, w, f"{name}.norm_in", groups)), w, f"{name}.conv_in")
        shift, scale = linear(silu(c), w, f"{name}.film").chunk(2, dim=-1)
        h = group_norm(h, w, f"{name}.norm_out", groups) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        skip = convolved(x, w, f"{name}.skip") if f"{name}.skip.weight" in w else x
        return skip + convolved(silu(h), w, f"{name}.conv_out")

    def block(self, x: Tensor, c: Tensor, cond: Cond, name: str) -> Tensor:
        w, heads = self.weights, self.config.heads
        q, k, v = linear(layer_norm(x, w, f"{name}.norm_attention"), w, f"{name}.attention.qkv.linear").chunk(3, dim=-1)
        x = x + linear(attended(q, k, v, heads), w, f"{name}.attention.out")
        if self.config.text_width:
            x = x + plain_attention(layer_norm(x, w, f"{name}.norm_cross"), cond.text, w, f"{name}.cross", heads, cond.mask)
        hidden = gelu(linear(layer_norm(x, w, f"{name}.norm_mlp"), w, f"{name}.mlp.inner"))
        shift, scale = linear(silu(c), w, f"{name}.mlp.film").chunk(2, dim=-1)
        return x + linear(hidden * (1 + scale[:, None]) + shift[:, None], w, f"{name}.mlp.outer")


class TestSimpleUViT(Parity):
    identity = False
    sizes: ClassVar = [(8, 8), (8, 16), (24, 8)]
    configs: ClassVar = {
        "classes": TINY,
        "text": TINY.replace(classes=0, text_width=12, patch=1, layers=2, dropout=0.2),
        "three levels": TINY.replace(widths=(8, 8, 12), patch=1, channels=4, classes=0),
        "both": TINY.replace(text_width=8, groups=2, side=4, heads=4, condition=8),
    }
    presets: ClassVar = {  # the paper: 2B
        "128": (simple_uvit_128, 2_481_880_067),
        "256": (simple_uvit_256, 2_481_900_812),
        "512": (simple_uvit_512, 2_481_983_792),
    }

    def peer(self, config: SimpleUViTConfig) -> nn.Module:
        return PaperSimpleUViT(config)

    def call(self, peer: PaperSimpleUViT, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return peer(x, t, cond)

    def names(self, config: SimpleUViTConfig) -> Names:
        return same_names(config)

    def cond(self, config: SimpleUViTConfig, rows: int = 2) -> Cond:
        cond = Cond.of_classes(torch.randint(0, 5, (rows,)))
        if config.text_width:
            cond.text, cond.mask = torch.randn(rows, 5, config.text_width), torch.arange(5) < torch.randint(1, 6, (rows, 1))
        return cond

    def test_any_multiple_of_the_patch_will_do(self, config: SimpleUViTConfig) -> None:
        x, t, cond = self.inputs(config, (10, 14))
        out = self.net(config)(x, t, cond)
        assert out.shape == x.shape
        assert out.isfinite().all()


def test_residual_blocks_add_nothing_at_first_and_the_transformer_is_the_identity() -> None:
    x, c = torch.randn(2, 8, 4, 4), torch.randn(2, 20)
    assert torch.equal(FilmResBlock(8, 8, 20, 4)(x, c), x)
    tokens, text = torch.randn(2, 4, 16), torch.randn(2, 3, 12)
    assert torch.equal(SimpleUViTBlock(TINY.replace(text_width=12))(tokens, c, text), tokens)


def test_dropout_is_the_transformers_alone_and_only_while_training() -> None:
    net = TestSimpleUViT().net(TINY.replace(dropout=0.5))
    x, t, cond = TestSimpleUViT().inputs(TINY, (8, 8))
    assert torch.equal(net(x, t, cond), net(x, t, cond))
    net.train()
    assert not torch.equal(net(x, t, cond), net(x, t, cond))
    dropped = [name for name, module in net.named_modules() if isinstance(module, nn.Dropout)]
    assert dropped
    assert all(name.startswith("transformer.") for name in dropped)


def test_nearly_all_weights_stand_in_the_transformer() -> None:
    # The paper's reason for the architecture: weights where maps are small, convolutions where they are large.
    with torch.device("meta"):
        net = simple_uvit_128().build()
    assert count(net.transformer) > 0.95 * count(net)


def test_the_label_must_be_given() -> None:
    x, t, cond = TestSimpleUViT().inputs(TINY, (8, 8))
    cond.label = None
    with pytest.raises(ValueError, match="label must be given"):
        TINY.build()(x, t, cond)
