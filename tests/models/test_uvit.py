"""U-ViT against the paper's formulas, written down apart; diffusers has none of it."""

from typing import ClassVar

import pytest
import torch
from formulas import Paper, gelu, layer_norm, linear, plain_attention, same_names
from parity import Parity, distance
from torch import Tensor, nn

from mezzotint.models import Cond
from mezzotint.models.embed import resample, sinusoid
from mezzotint.models.uvit import UViTConfig, uvit_h_2, uvit_l_2, uvit_m_4, uvit_s_2, uvit_s_2_deep, uvit_s_2_text
from mezzotint.weights import Names

TINY = UViTConfig(width=16, depth=4, heads=2, side=4, classes=5)


class PaperUViT(Paper):
    """Bao et al. 2023, figure 1, with the patches of a square picture in rows."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        w, config = self.weights, self.config
        b, channels, height, width = x.shape
        p, rows, columns = config.patch, height // config.patch, width // config.patch
        patches = torch.stack([x[:, :, i * p : i * p + p, j * p : j * p + p] for i in range(rows) for j in range(columns)], dim=1)
        image = linear(patches.permute(0, 1, 3, 4, 2).flatten(2), w, "embed_patch") + resample(w["positions_patch"], rows, columns)
        told, keys = [sinusoid(1000 * t, config.width)], [torch.ones(b, 1, dtype=torch.bool)]
        if config.classes:
            assert cond.label is not None
            told, keys = [w["embed_label.weight"][cond.label], *told], [*keys, keys[0]]
        if config.text_width:
            assert cond.mask is not None
            told, keys = [*told, *linear(cond.text, w, "embed_text").unbind(1)], [*keys, cond.mask]
        h = torch.cat([torch.stack(told, dim=1) + w["positions_told"][: len(told)], image], dim=1)
        mask = torch.cat([*keys, torch.ones(b, rows * columns, dtype=torch.bool)], dim=1)
        skips = []
        for i in range(config.depth // 2):
            h = self.block(h, f"down.{i}", mask)
            skips.append(h)
        h = self.block(h, "middle", mask)
        for i in range(config.depth // 2):
            h = self.block(linear(torch.cat([h, skips[-1 - i]], dim=-1), w, f"joins.{i}"), f"up.{i}", mask)
        drawn = linear(layer_norm(h, w, "norm")[:, len(told) :], w, "head").unflatten(-1, (p, p, channels)).permute(0, 1, 4, 2, 3)
        lines = [torch.cat(list(drawn[:, i * columns : (i + 1) * columns].unbind(1)), dim=-1) for i in range(rows)]
        out = torch.cat(lines, dim=-2)
        return nn.functional.conv2d(out, w["smooth.weight"], w["smooth.bias"], padding=1) if config.smooth else out

    def block(self, x: Tensor, name: str, mask: Tensor) -> Tensor:
        w = self.weights
        normal = layer_norm(x, w, f"{name}.norm_attention")
        x = x + plain_attention(normal, normal, w, f"{name}.attention", self.config.heads, mask)
        return x + linear(gelu(linear(layer_norm(x, w, f"{name}.norm_mlp"), w, f"{name}.mlp.0")), w, f"{name}.mlp.2")


class TestUViT(Parity):
    configs: ClassVar = {
        "classes": TINY,
        "text": TINY.replace(classes=0, text_width=12, text_length=6, smooth=True, heads=4),
        "neither": TINY.replace(classes=0, depth=2, patch=4, side=2, channels=3, smooth=True),
        "both": TINY.replace(text_width=8, text_length=5, depth=6),
    }
    presets: ClassVar = {  # the paper: 501M, 287M, 131M, 44M, 45M, 58M
        "h-2": (uvit_h_2, 500_832_016),
        "l-2": (uvit_l_2, 286_763_172),
        "m-4": (uvit_m_4, 130_941_060),
        "s-2": (uvit_s_2, 44_255_328),
        "s-2-text": (uvit_s_2_text, 44_692_644),
        "s-2-deep": (uvit_s_2_deep, 58_345_636),
    }

    def peer(self, config: UViTConfig) -> nn.Module:
        peer = PaperUViT(config)
        with torch.no_grad():
            for p in peer.parameters():
                p.mul_(8 if p.ndim > 1 else 1)  # at the deviation of the start a softmax is a mean
        return peer

    def net(self, config: UViTConfig) -> nn.Module:
        return self.pair(config)[0]

    def call(self, peer: PaperUViT, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return peer(x, t, cond)

    def names(self, config: UViTConfig) -> Names:
        return same_names(config)

    def cond(self, config: UViTConfig, rows: int = 2) -> Cond:
        cond = Cond.of_classes(torch.randint(0, 5, (rows,)))
        if config.text_width:
            cond.text, cond.mask = torch.randn(rows, 5, config.text_width), torch.arange(5) < torch.randint(1, 6, (rows, 1))
        return cond

    def test_it_starts_at_zero(self, config: UViTConfig) -> None:
        # It does not: Bao et al. start all layers with a deviation of 0.02, and have no gates.
        torch.manual_seed(0)
        net = config.replace(width=128).build()
        layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
        assert all(0.018 < float(layer.weight.detach().std()) < 0.022 for layer in layers if layer.weight.numel() > 1000)
        assert not any(layer.bias.any() for layer in layers if layer.bias is not None)
        assert 0.018 < float(net.positions_patch.detach().std()) < 0.022
        x, t, cond = self.inputs(config, (8, 8))
        assert 0 < net(x, t, cond).std() < 1

    def test_patches_know_their_place(self, config: UViTConfig) -> None:
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 8))
        p = config.patch
        moved = torch.cat([x[..., p:], x[..., :p]], dim=-1)
        out = net(moved, t, cond)
        assert distance(torch.cat([out[..., -p:], out[..., :-p]], dim=-1), net(x, t, cond)) > 1e-2


def test_no_class_has_a_row_of_its_own() -> None:
    net = TestUViT().net(TINY)
    x, t, cond = TestUViT().inputs(TINY, (8, 8))
    nothing = net(x, t, cond.null())
    with torch.no_grad():
        net.embed_label.weight[:5] += 1
    assert torch.equal(net(x, t, cond.null()), nothing)
    with torch.no_grad():
        net.embed_label.weight[5] += 1
    assert distance(net(x, t, cond.null()), nothing) > 1e-3


def test_what_the_network_needs_must_be_given() -> None:
    x, t, cond = TestUViT().inputs(TINY, (8, 8))
    cond.label = None
    with pytest.raises(ValueError, match="label must be given"):
        TINY.build()(x, t, cond)
    text = TINY.replace(text_width=8, text_length=3)
    x, t, cond = TestUViT().inputs(text, (8, 8))
    with pytest.raises(ValueError, match="text must have at most 3 tokens, got 5"):
        text.build()(x, t, cond)
    with pytest.raises(ValueError, match="depth must be even"):
        TINY.replace(depth=3).build()


def test_positions_of_another_size_are_those_between() -> None:
    table = torch.randn(9, 5)
    assert torch.equal(resample(table, 3, 3), table)
    # Where rows and columns count on evenly, so they nearly do between; the ends of the table bend the outermost.
    even = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij"), dim=-1).reshape(-1, 2)
    finer = resample(even, 24, 36).unflatten(0, (24, 36))
    rows, columns = (torch.arange(24) + 0.5) / 2 - 0.5, (torch.arange(36) + 0.5) / 3 - 0.5
    expected = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    assert torch.allclose(finer[6:-6, 6:-6], expected[6:-6, 6:-6], atol=0.1)
