"""The published DiT against diffusers' DiTTransformer2DModel.

The peer is set to the paper's code in three points: norms have an epsilon of 1e-6, frequencies of the time are 1 / 128 of the
scale apart (it has 1 / 127), and the embeddings, of which every block keeps a copy, are one. It draws squares only.

The paper's counts, such as 675,129,632 of XL/2, include the fixed positions, which are no parameters here.
"""

from typing import ClassVar

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from parity import Network, Parity, count, distance
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.models import Cond
from mezzotint.models.class_dit import ClassDiTConfig, Variant, dit_b_2, dit_l_2, dit_s_2, dit_xl_2, dit_xl_2_512
from mezzotint.weights import Names, class_dit

TINY = ClassDiTConfig(width=24, depth=2, heads=2, classes=5, span=4.0)


class TestVariants(Network):
    """The other two ways of figure 3, which have no published weights."""

    identity = False
    configs: ClassVar = {
        "cross-attention": TINY.replace(variant="cross_attention"),
        "in context": TINY.replace(variant="in_context", variance=False),
    }

    def cond(self, config: ClassDiTConfig, rows: int = 2) -> Cond:
        return Cond.of_classes(torch.randint(-1, config.classes, (rows,)))

    def test_time_and_class_are_heard(self, config: ClassDiTConfig) -> None:
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 12))
        assert cond.label is not None
        out = net(x, t, cond)
        assert out.shape == x.shape
        assert distance(net(x, t, Cond.of_classes((cond.label + 1) % 5)), out) > 1e-3
        assert distance(net(x, 1 - t, cond), out) > 1e-3


@pytest.mark.parametrize(
    ("variant", "gflops", "millions"), [("adaln_zero", 118.6, 675), ("cross_attention", 137.6, 598), ("in_context", 119.4, 449)]
)
def test_sizes_and_costs_are_the_papers(variant: Variant, gflops: float, millions: int) -> None:
    # Figure 5 and table 4 of the paper, which counts a multiplication and an addition as one.
    with torch.device("meta"):
        net = dit_xl_2().replace(variant=variant).build()
        inputs = torch.randn(1, 4, 32, 32), torch.rand(1), Cond.of_classes(torch.zeros(1, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter:
        net(*inputs)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=1e-3)
    assert count(net) / 1e6 == pytest.approx(millions, abs=1)


class TestClassDiT(Parity):
    sizes: ClassVar = [(8, 8), (12, 12), (4, 4)]
    configs: ClassVar = {
        "dit": TINY,
        "without variance": TINY.replace(variance=False, depth=3, channels=3),
        "larger patches": TINY.replace(patch=4, span=2.0, heads=3),
    }
    presets: ClassVar = {
        "xl-2": (dit_xl_2, 674_834_720),
        "xl-2-512": (dit_xl_2_512, 674_834_720),
        "l-2": (dit_l_2, 457_840_672),
        "b-2": (dit_b_2, 130_315_808),
        "s-2": (dit_s_2, 32_865_056),
    }

    def peer(self, config: ClassDiTConfig) -> nn.Module:
        peer = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=config.channels,
            out_channels=(2 if config.variance else 1) * config.channels,
            num_layers=config.depth,
            sample_size=int(config.span) * config.patch,
            patch_size=config.patch,
            num_embeds_ada_norm=config.classes,
            norm_eps=1e-6,
        )
        embedding = peer.transformer_blocks[0].norm1.emb
        embedding.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        for block in peer.transformer_blocks:
            block.norm1.emb = embedding
        return peer

    def call(self, peer: DiTTransformer2DModel, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.label is not None
        label = cond.label.where(cond.label >= 0, peer.config.num_embeds_ada_norm)
        return peer(x, timestep=1000 * t, class_labels=label).sample[:, : x.shape[1]]

    def names(self, config: ClassDiTConfig) -> Names:
        return class_dit.diffusers(config)

    def cond(self, config: ClassDiTConfig, rows: int = 2) -> Cond:
        return Cond.of_classes(torch.randint(-1, config.classes, (rows,)))

    def test_sides_may_differ(self) -> None:
        ours, _ = self.pair(TINY)
        x, t, cond = self.inputs(TINY, (8, 12))
        out = ours(x, t, cond)
        assert out.shape == x.shape
        assert not torch.allclose(ours(x.flip(3), t, cond).flip(3), out, atol=1e-3)

    def test_what_is_missing_or_unknown_is_refused(self) -> None:
        x, t, cond = self.inputs(TINY, (8, 8))
        cond.label = None
        with pytest.raises(ValueError, match="label must be given to this network"):
            TINY.build()(x, t, cond)
        with pytest.raises(ValueError, match="variant must be one of adaln_zero, cross_attention, in_context, got adaln"):
            TINY.replace(variant="adaln").build()
