"""The joint DiT: its initialisation, its positions, its masks."""

from typing import ClassVar

import pytest
import torch
from parity import Network

from mezzotint.models import Cond, DiT, DiTConfig
from mezzotint.models.embed import patch_grid, patchify, rope, rotate, unpatchify

TINY = DiTConfig(width=32, depth=2, heads=2, patch=2, channels=4, text_width=16)


class TestDiT(Network):
    configs: ClassVar = {
        "dit": TINY,
        "overlapping patches": TINY.replace(patch=4, stride=2, heads=4, depth=3, channels=3, prediction="velocity"),
    }

    def cond(self, config: DiTConfig, rows: int = 2) -> Cond:
        mask = torch.arange(5) < torch.randint(1, 6, (rows, 1))
        return Cond(torch.randn(rows, 5, config.text_width), mask, torch.randn(rows, config.text_width))


@pytest.fixture
def net() -> DiT:
    torch.manual_seed(0)
    return DiTConfig(width=32, depth=2, heads=2, patch=4, text_width=16).build()


@pytest.fixture
def cond() -> Cond:
    torch.manual_seed(1)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return Cond(torch.randn(2, 3, 16), mask, torch.randn(2, 16))


def filled(net: DiT) -> DiT:
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def test_at_first_the_output_is_zero_and_blocks_are_identities(net: DiT, cond: Cond) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x, torch.rand(2), cond), torch.zeros_like(x))
    tokens, c = torch.randn(2, 7, 32), torch.randn(2, 32)
    assert torch.equal(net.blocks[0](tokens, c, rope(torch.randn(7, 3), net.axes)), tokens)


def test_gradients_reach_the_net_in_the_order_of_its_zero_layers(net: DiT, cond: Cond) -> None:
    # First only the output layer learns, then the gates and the patches, then attention and MLP.
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    moving = []
    for _ in range(3):
        optimizer.zero_grad()
        (net(x, t, cond) - x).square().mean().backward()
        moving.append({name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert moving[0] == {"head.weight", "head.bias"}
    assert "blocks.0.attention.kv.weight" not in moving[1]
    assert {"embed_patch.weight", "modulation.linear.weight"} <= moving[1]
    assert {"blocks.0.modulation.linear.weight", "blocks.0.attention.kv.weight"} & moving[2]


def test_masked_text_is_not_seen(net: DiT, cond: Cond) -> None:
    filled(net)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    changed = Cond(cond.text.clone(), cond.mask, cond.pooled)
    changed.text[0, 2] += 100.0  # a masked token
    assert torch.allclose(net(x, t, cond), net(x, t, changed), atol=1e-6)
    changed.text[0, 1] += 100.0  # a real one
    assert not torch.allclose(net(x, t, cond)[0], net(x, t, changed)[0], atol=1e-3)
    assert torch.allclose(net(x, t, cond)[1], net(x, t, changed)[1], atol=1e-6)


def test_padding_does_not_change_the_output(net: DiT, cond: Cond) -> None:
    filled(net)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    longer = Cond.cat([cond, Cond(torch.randn(1, 9, 16), torch.ones(1, 9, dtype=torch.bool), torch.zeros(1, 16))]).index(slice(0, 2))
    assert longer.text.shape[1] == 9
    assert torch.allclose(net(x, t, cond), net(x, t, longer), atol=1e-5)


def test_a_picture_is_a_video_of_one_frame(net: DiT, cond: Cond) -> None:
    filled(net)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert torch.equal(net(x, t, cond), net(x[:, :, None], t, cond)[:, :, 0])


def test_patches_know_their_place_and_any_size_works(net: DiT, cond: Cond) -> None:
    filled(net)
    x, t = torch.randn(2, 3, 8, 16), torch.rand(2)
    out = net(x, t, cond)
    assert out.shape == x.shape
    assert not torch.allclose(net(x.flip(3), t, cond).flip(3), out, atol=1e-3)
    assert DiTConfig(width=32, heads=2, patch=4, stride=2, text_width=16).build()(x[..., :10], t, cond).shape == (2, 3, 8, 10)
    with pytest.raises(ValueError, match="a side must be a multiple of 4"):
        net(torch.randn(2, 3, 10, 8), t, cond)


def test_patches_come_back() -> None:
    x = torch.randn(2, 3, 2, 8, 12)
    assert torch.equal(unpatchify(patchify(x, 4), 4, x.shape), x)
    assert torch.equal(patchify(x, 4)[0, 1].unflatten(0, (4, 4, 3)), x[0, :, 0, :4, 4:8].permute(1, 2, 0))


def test_overlapping_patches_see_their_part_and_add_up() -> None:
    x = torch.randn(2, 3, 1, 8, 12)
    seen = patchify(x, 4, stride=2)
    assert seen.shape == (2, patch_grid(8, 4, 2) * patch_grid(12, 4, 2), 48)
    assert torch.equal(seen[1, 6].unflatten(0, (4, 4, 3)), x[1, :, 0, 2:6, 2:6].permute(1, 2, 0))
    # Drawing is the transpose of seeing: <patchify(x), y> = <x, unpatchify(y)>.
    y = torch.randn_like(seen)
    assert float((seen * y).sum()) == pytest.approx(float((x * unpatchify(y, 4, x.shape, stride=2)).sum()), rel=1e-4, abs=1e-3)


def test_rotation_depends_on_differences_of_positions_only() -> None:
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def product(a: list[float], b: list[float]) -> torch.Tensor:
        axes = (4, 4, 4)
        return (rotate(q, rope(torch.tensor([a]), axes)) * rotate(k, rope(torch.tensor([b]), axes))).sum()

    near = product([0.0, 1.0, 2.0], [0.0, 3.0, 5.0])
    assert torch.allclose(near, product([0.0, 11.0, 2.0], [0.0, 13.0, 5.0]), atol=1e-4)
    assert not torch.allclose(near, product([0.0, 1.0, 2.0], [0.0, 4.0, 5.0]), atol=1e-3)
    assert torch.allclose(rotate(q, rope(torch.tensor([[3.0, 1.0, 2.0]]), (4, 4, 4))).norm(), q.norm())


def test_the_video_axis_idles_for_pictures_only(net: DiT, cond: Cond) -> None:
    filled(net)
    x = torch.randn(2, 3, 2, 8, 8)
    out = net(x, torch.rand(2), cond)
    swapped = net(x.flip(2), torch.rand(2), cond).flip(2)
    assert out.shape == x.shape
    assert not torch.allclose(out, swapped, atol=1e-3)


def test_conditions_can_be_cut_and_joined(cond: Cond) -> None:
    null = cond.null()
    assert not null.mask.any()  # type: ignore[union-attr]
    assert not null.pooled.any()
    assert torch.equal(Cond.cat([cond, null]).index(slice(0, 2)).text, cond.text)
    assert torch.equal(cond.repeat(2).pooled, cond.pooled.repeat_interleave(2, 0))
