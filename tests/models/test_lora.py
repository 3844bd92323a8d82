"""Adapters on any network: they start as nothing, are what the papers' formulas say, add up, and leave no trace."""

import copy
from typing import Any

import pytest
import torch
from parity import EQUAL, count, distance, scatter
from test_flux import TINY as FLUX
from test_unet import TINY as UNET
from torch import Tensor, nn

from mezzotint.models import PRESETS, Cond, DiTConfig, lora
from mezzotint.models.flux import flux_dev
from mezzotint.models.lora import LoRAConfig

CONFIGS = {"flux": FLUX, "unet": UNET}
ARCHITECTURES = {config.kind: config for config in reversed([DiTConfig(), *(make() for make in PRESETS.values())])}


def inputs(config: Any) -> tuple[Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    cond = Cond(torch.randn(2, 5, config.text_width), None, torch.randn(2, config.pooled_width))
    cond.guidance = torch.tensor([2.0, 3.5])
    return torch.randn(2, config.channels, 8, 8), torch.rand(2), cond


def network(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return scatter(config.build())


def shake(net: nn.Module) -> nn.Module:
    """Random numbers where a fresh adapter has its start; a DoRA's lengths stay near it."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.requires_grad:
                p.mul_(1 + 0.3 * torch.rand_like(p)) if "magnitude" in name else p.normal_(std=0.3)
    return net


def changed(net: nn.Module, *states: tuple[dict[str, Tensor], float]) -> nn.Module:
    """A copy of a plain network whose weights are W + sum of s (alpha / r) B A, by hand."""
    net = copy.deepcopy(net)
    for state, strength in states:
        for key in [key for key in state if key.endswith(".alpha")]:
            layer = key.removesuffix(".alpha")
            a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
            weight = net.get_submodule(layer).get_parameter("weight")
            weight.data += strength * state[key] / len(a) * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return net


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(config: Any, dora: bool) -> None:
    net, given = network(config), inputs(config)
    out = net(*given)
    lora.add(net, LoRAConfig(rank=3, targets=("*",), dora=dora))
    assert distance(net(*given), out) <= (0 if config is FLUX and not dora else EQUAL)  # convolutions round as their input lies in memory
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained
    assert trained == {name for name, _ in net.named_parameters() if ".lora_" in name}
    assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


def test_it_is_the_formula(config: Any) -> None:
    net, given = network(config), inputs(config)
    plain = copy.deepcopy(net)
    lora.add(net, LoRAConfig(rank=3, alpha=5.0, targets=("*",)))
    state = lora.state(shake(net))
    expected = changed(plain, (state, 1.0))(*given)
    assert distance(plain(*given), expected) > 1e-2
    assert distance(net(*given), expected) <= EQUAL
    lora.merge(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert distance(net(*given), expected) <= EQUAL


def test_adapters_add_up_at_their_strengths(config: Any) -> None:
    net, given = network(config), inputs(config)
    plain, states = copy.deepcopy(net), []
    for name, rank, targets in (("style", 2, ("*",)), ("few steps", 4, ("*.mlp.*", "*inner"))):
        lora.add(net, LoRAConfig(rank=rank, alpha=3.0, targets=targets), name)
        states.append(lora.state(shake(net), name))
    assert list(lora.names(net)) == ["style", "few steps"]
    assert distance(net(*given), changed(plain, (states[0], 1.0), (states[1], 1.0))(*given)) <= EQUAL
    lora.scale(net, "style", 0.25)
    lora.scale(net, "few steps", -0.5)
    expected = changed(plain, (states[0], 0.25), (states[1], -0.5))(*given)
    assert distance(net(*given), expected) <= EQUAL
    merged = copy.deepcopy(net)
    lora.merge(merged)
    assert distance(merged(*given), expected) <= EQUAL
    lora.scale(net, "few steps", 0.0)
    assert distance(net(*given), changed(plain, (states[0], 0.25))(*given)) <= EQUAL
    lora.scale(net, "style", 0.0)
    assert distance(net(*given), plain(*given)) <= EQUAL


def test_only_the_newest_is_trained_beside_others_that_work(config: Any) -> None:
    net = network(config)
    lora.add(net, LoRAConfig(rank=2), "old")
    lora.add(net, LoRAConfig(rank=2), "new")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net.named_parameters() if ".lora_" in name and ".new." in name}


def test_what_is_removed_leaves_no_trace(config: Any) -> None:
    net, given = network(config), inputs(config)
    keys = list(net.state_dict())
    before = {name: p.clone() for name, p in net.named_parameters()}
    lora.add(net, LoRAConfig(rank=2), "one")
    one = shake(net)(*given)
    lora.add(net, LoRAConfig(rank=3, targets=("*",)), "two")
    shake(net)
    lora.remove(net, "two")
    assert distance(net(*given), one) <= EQUAL
    lora.remove(net, "one")
    assert list(net.state_dict()) == keys
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert not lora.names(net)


def test_a_state_goes_to_another_network_whatever_its_ranks_and_alphas(config: Any) -> None:
    net, other, given = network(config), network(config), inputs(config)
    lora.add(net, LoRAConfig(rank=2, alpha=3.0, targets=("*",)))
    state = {key: x.clone() for key, x in lora.state(shake(net)).items()}
    wide = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")][::3]
    for layer in wide:
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        state[a], state[b] = torch.cat([state[a]] * 2), torch.cat([state[b]] * 2, dim=1)
        state[f"{layer}.alpha"] = torch.tensor(6.0)
    lora.load(other, state, "twin")
    assert distance(other(*given), changed(network(config), (state, 1.0))(*given)) <= EQUAL
    back = lora.state(other, "twin")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], x) for key, x in state.items())


def test_dora_is_the_formula(config: Any) -> None:
    net, given = network(config), inputs(config)
    plain = copy.deepcopy(net)
    lora.add(net, LoRAConfig(rank=3, alpha=5.0, targets=("*",), dora=True))
    state = lora.state(shake(net))
    expected = changed(plain, (state, 1.0))
    for key in [key for key in state if key.endswith("magnitude_vector")]:
        weight = expected.get_submodule(key.removesuffix(".lora_magnitude_vector")).get_parameter("weight")
        lengths = weight.flatten(1).norm(dim=1)
        weight.data *= (state[key].flatten() / lengths).reshape(-1, *(1 for _ in weight.shape[1:]))
    out = expected(*given)
    assert distance(changed(plain, (state, 1.0))(*given), out) > 1e-2
    assert distance(net(*given), out) <= EQUAL
    lora.merge(net)
    assert distance(net(*given), out) <= EQUAL
    lora.load(plain, state)
    assert distance(plain(*given), out) <= EQUAL


def test_training_moves_the_adapter_only() -> None:
    net, given = network(FLUX), inputs(FLUX)
    before = {name: p.clone() for name, p in net.named_parameters()}
    target = torch.randn_like(given[0])
    lora.add(net, LoRAConfig(rank=4, alpha=8.0))
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (net(*given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    lora.remove(net)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_network_in_bfloat16_has_adapters_in_float32() -> None:
    net = network(FLUX).bfloat16()
    lora.add(net, LoRAConfig(rank=2))
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    state = lora.state(shake(net))
    expected = {name: p.bfloat16() for name, p in changed(network(FLUX).bfloat16().float(), (state, 1.0)).named_parameters()}
    lora.merge(net)
    assert all(torch.equal(p, expected[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("published", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_network_has_sensible_targets(published: Any) -> None:
    with torch.device("meta"):
        net = published.build()
        plain = count(net)
        lora.add(net, LoRAConfig(rank=1))
    layers = {key.removesuffix(".alpha") for key in lora.state(net) if key.endswith(".alpha")}
    leaves = {layer.split(".")[-1] for layer in layers}
    assert leaves <= {"linear", "q", "kv", "out", "inner", "outer", "0", "2"}
    assert not any("modulation" in layer or "embed" in layer or "head" in layer for layer in layers)
    assert 1e-5 < (count(net) - plain) / plain < 1e-2


def test_the_share_of_flux_that_is_trained() -> None:
    with torch.device("meta"):
        net = flux_dev().build()
        lora.add(net, LoRAConfig(rank=16))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert (trained, count(net) - trained) == (56_033_280, 11_901_408_320)


def test_what_cannot_be_is_said() -> None:
    net = network(FLUX)
    with pytest.raises(ValueError, match=r"targets must be names of layers.*'blocks\.\*' fits none of embed_patch"):
        lora.add(net, LoRAConfig(targets=("blocks.*",)))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora.add(net, LoRAConfig(rank=0))
    lora.add(net, LoRAConfig(rank=2), "mine")
    with pytest.raises(ValueError, match="has an adapter 'mine'"):
        lora.add(net, LoRAConfig(rank=2), "mine")
    for call in (lora.state, lora.remove, lambda net, name: lora.scale(net, name, 1.0)):
        with pytest.raises(ValueError, match=r"one of \['mine'\], got 'yours'"):
            call(net, "yours")
    state = lora.state(net, "mine")
    whole = network(FLUX)
    for key, x in (
        ("single.0.outer.lora_A.weight", torch.zeros(2, 5)),
        ("single.0.outer.lora_B.weight", torch.zeros(32, 3)),
        ("single.9.outer.alpha", torch.zeros(())),
        ("single.0.outer.bias", torch.zeros(32)),
    ):
        with pytest.raises(ValueError, match=r"1 layers of the adapter are not the network's, or of another size: single"):
            lora.load(whole, state | {key: x})
    del state["single.0.outer.alpha"]
    with pytest.raises(ValueError, match=r"another size: single\.0\.outer"):
        lora.load(whole, state)
    assert not lora.names(whole)
    assert all(p.requires_grad for p in whole.parameters())


def test_depthwise_convolutions_have_no_adapters() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3))
    assert list(lora.layers(net)) == ["1"]
