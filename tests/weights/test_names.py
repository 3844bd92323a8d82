"""Maps of names: both ways, every change undone, nothing left over or missing in silence."""

import pytest
import torch
from torch import Tensor, nn

from mezzotint.models.embed import patchify
from mezzotint.weights.names import SWAP, Change, Names, Rule, columns, conv, copies, fill, fuse, reshape, rows, stack

NAMES = Names(
    [
        Rule("head.out.1", "tops.1.scaled", SWAP),
        Rule("head.out.*", "tops.*.scaled"),
        Rule("blocks.*.qkv", ("layers.*.q", "layers.*.k", "layers.*.v"), fuse(4, 1, 1)),
        Rule("blocks.*.experts.*.norm.weight", "layers.*.e.*.norm.scale"),
        Rule(("a", "b"), "ab", fuse(1, 1).reversed),
    ]
)


def theirs() -> dict[str, Tensor]:
    state: dict[str, Tensor] = {"ab.weight": torch.randn(6, 2)}
    for i in range(11):
        state |= {f"layers.{i}.{name}.weight": torch.randn(n, 3) for name, n in (("q", 8), ("k", 2), ("v", 2))}
        state[f"layers.{i}.e.3.norm.scale"] = torch.randn(5)
    return state | {f"tops.{i}.scaled.bias": torch.arange(4.0) for i in range(3)}


def test_names_are_carried_over_and_back() -> None:
    state = theirs()
    ours = NAMES.to_ours(state)
    assert torch.equal(ours["blocks.10.qkv.weight"][8:10], state["layers.10.k.weight"])
    assert torch.equal(ours["blocks.10.experts.3.norm.weight"], state["layers.10.e.3.norm.scale"])
    assert torch.equal(torch.cat([ours["a.weight"], ours["b.weight"]]), state["ab.weight"])
    assert len(ours) == 2 + 2 * 11 + 3
    back = NAMES.to_theirs(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_first_rule_counts_on_both_sides() -> None:
    ours = NAMES.to_ours(theirs())
    assert ours["head.out.1.bias"].tolist() == [2, 3, 0, 1]
    assert ours["head.out.0.bias"].tolist() == ours["head.out.2.bias"].tolist() == [0, 1, 2, 3]
    assert NAMES.to_theirs(ours)["tops.1.scaled.bias"].tolist() == [0, 1, 2, 3]


def test_what_is_left_over_or_missing_is_listed() -> None:
    state = theirs()
    del state["layers.3.k.weight"]
    state["layers.3.z.weight"] = state["layers.0.q.running"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"2 left over: layers\.3\.z\.weight, layers\.0\.q\.running; 1 missing: layers\.3\.k\.weight"):
        NAMES.to_ours(state)
    ours = NAMES.to_ours(theirs())
    del ours["b.weight"]
    with pytest.raises(ValueError, match=r"1 missing: b\.weight"):
        NAMES.to_theirs(ours)


@pytest.mark.parametrize(
    ("change", "shapes", "result"),
    [
        (conv(2), [(5, 3, 2, 2)], [(5, 12)]),
        (columns(2), [(5, 12)], [(5, 12)]),
        (rows(2), [(12, 5)], [(12, 5)]),
        (rows(2), [(12,)], [(12,)]),
        (conv(2), [(5,)], [(5,)]),
        (stack(3), [(4, 2)] * 3, [(3, 4, 2)]),
        (stack(2, 3), [(4, 2)] * 6, [(2, 12, 2)]),
        (fuse(2, 1), [(4, 3), (2, 3)], [(6, 3)]),
        (conv(1).then(fuse(1, 1)), [(4, 3, 1, 1), (4, 3, 1, 1)], [(8, 3)]),
        (reshape((2, 3), (6,)), [(6,)], [(2, 3)]),
        (SWAP, [(6, 2)], [(6, 2)]),
    ],
)
def test_every_change_is_undone(change: Change, shapes: list[tuple[int, ...]], result: list[tuple[int, ...]]) -> None:
    given = [torch.randn(shape) for shape in shapes]
    ours = change.to_ours(given)
    assert [tuple(x.shape) for x in ours] == result
    assert all(torch.equal(a, b) for a, b in zip(change.to_theirs(ours), given, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(change.reversed.to_ours(ours), given, strict=True))


def test_a_convolution_over_patches_is_a_linear_layer_over_them() -> None:
    net, x = nn.Conv2d(3, 5, 2, stride=2), torch.randn(2, 3, 4, 6)
    (weight,) = conv(2).to_ours([net.weight])
    tokens = nn.functional.linear(patchify(x[:, :, None], 2), weight, net.bias)
    assert torch.allclose(tokens, net(x).flatten(2).mT, atol=1e-5)
    packed = x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (c ph pw)
    (weight,) = columns(2).to_ours([net.weight.flatten(1)])
    tokens = nn.functional.linear(patchify(x[:, :, None], 2), weight)
    assert torch.allclose(tokens, nn.functional.linear(packed, net.weight.flatten(1)), atol=1e-5)


def test_copies_must_be_copies() -> None:
    x = torch.randn(3)
    assert torch.equal(copies(2).to_ours([x, x.clone()])[0], x)
    assert len(copies(2).to_theirs([x])) == 2
    with pytest.raises(ValueError, match="must be copies of each other differ"):
        copies(2).to_ours([x, x + 1])


def test_a_network_is_filled_whole_or_not_at_all() -> None:
    net, names = nn.Linear(2, 3), Names([Rule("weight", "w"), Rule("bias", "b"), Rule("more", "m")])
    state = {"w": torch.randn(3, 2), "b": torch.randn(3)}
    fill(net, state, names)
    assert torch.equal(net.weight, state["w"])
    with pytest.raises(ValueError, match=r"1 missing: b$"):
        fill(net, {"w": state["w"]}, names)
    with pytest.raises(ValueError, match=r"1 left over: m; 1 missing: w$"):
        fill(net, {"b": state["b"], "m": torch.zeros(1)}, names)
    with pytest.raises(ValueError, match=r"bias is \(4,\) instead of \(3,\)"):
        fill(net, state | {"b": torch.zeros(4)}, names)
