"""DiT-Air, which has no published code: the paper's counts, and what every network must do."""

from typing import ClassVar

import pytest
import torch
from parity import Network, count, distance

from mezzotint.models import Cond
from mezzotint.models.dit_air import PARTS, DiTAirConfig
from mezzotint.models.mmdit import MMDiTConfig

TINY = DiTAirConfig(width=32, depth=3, heads=2, channels=4, text_width=24, pooled_width=20)


class TestDiTAir(Network):
    configs: ClassVar = {
        "air": TINY,
        "lite": TINY.replace(shared=("modulation", "attention")),
        "albert": TINY.replace(shared=PARTS, heads=4),
        "plain": TINY.replace(shared=(), patch=4),
    }

    def cond(self, config: DiTAirConfig, rows: int = 2) -> Cond:
        return Cond(torch.randn(rows, 5, config.text_width), None, torch.randn(rows, config.pooled_width))

    def test_every_block_uses_what_is_shared(self, config: DiTAirConfig) -> None:
        # A change of one shared weight shows in every block; of one that is its own, in that block only.
        net = self.net(config)
        x, t, cond = self.inputs(config, (8, 8))
        before, after = [], []
        for seen in (before, after):
            hooks = [block.norm.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out)) for block in net.blocks]
            out = net(x, t, cond)
            seen.append(out)
            for hook in hooks:
                hook.remove()
            last = net.blocks[-1]
            part = net.shared["mlp"] if "mlp" in config.shared else last.own["mlp"]
            torch.nn.init.normal_(part[2].weight)
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        # Two norms a block, then the output; the MLP comes after a block's second norm.
        assert changed == [False, False] + [("mlp" in config.shared)] * 4 + [True]


def test_a_layer_has_a_third_of_mmdits_parameters() -> None:
    with torch.device("meta"):
        air, mmdit = DiTAirConfig().build(), MMDiTConfig().build()
    ratio = count(air.blocks[0]) / count(mmdit.blocks[0])
    assert ratio == pytest.approx(1 / 3, abs=1e-3)  # 66.7% fewer; the paper says 66%


@pytest.mark.parametrize(
    ("shared", "per_layer", "once"), [((), 18, 0), (PARTS[:1], 12, 6), (PARTS[:2], 8, 10), (PARTS[::2], 4, 14), (PARTS, 0, 18)]
)
def test_what_sharing_saves(shared: tuple[str, ...], per_layer: int, once: int) -> None:
    with torch.device("meta"):
        net = DiTAirConfig(shared=shared).build()  # type: ignore[arg-type]
    square = DiTAirConfig().width ** 2
    assert count(net.blocks[0]) / square == pytest.approx(per_layer, abs=0.02)
    assert count(net.shared) / square == pytest.approx(once, abs=0.02)
    names = list(net.state_dict())
    assert len(names) == len(set(names))
    assert count(net) == sum(x.numel() for x in net.state_dict().values())  # nothing is stored twice


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="shared must name parts of modulation, attention, mlp, got head"):
        TINY.replace(shared=("head",)).build()


def test_frames_have_their_place() -> None:
    net = TestDiTAir().net(TINY)
    _, t, cond = TestDiTAir().inputs(TINY, (4, 4))
    x = torch.randn(2, 4, 3, 4, 4)
    assert distance(net(x.flip(2), t, cond).flip(2), net(x, t, cond)) > 1e-2
