"""Classifier-free guidance as an identity, and what it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, SHAPES, TIMES, normal
from torch import Tensor

from mezzotint.flow import guidance
from mezzotint.flow.guidance import cfg
from mezzotint.flow.path import from_velocity, like


class Network:
    """Two branches that count their calls."""

    def __init__(self) -> None:
        self.single = self.double = 0

    def conditional(self, x: Tensor, t: Tensor) -> Tensor:
        self.single += 1
        return 2 * x

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.double += 1
        return 2 * x, x


def test_scale_one_is_the_condition_and_zero_is_none() -> None:
    net, x, t = Network(), torch.randn(3, 4), torch.full((3,), 0.5)
    assert torch.equal(cfg(net.conditional, net.both, 1.0)(x, t), 2 * x)
    assert (net.single, net.double) == (1, 0)
    assert torch.equal(cfg(net.conditional, net.both, 0.0)(x, t), x)
    assert torch.allclose(cfg(net.conditional, net.both, 3.0)(x, t), 4 * x)


def test_outside_the_interval_one_branch_is_called() -> None:
    net, x = Network(), torch.randn(2, 4)
    denoise = cfg(net.conditional, net.both, 3.0, interval=(0.2, 0.6))
    for time in (0.1, 0.7, 1.0):
        assert torch.equal(denoise(x, torch.full((2,), time)), 2 * x)
    assert (net.single, net.double) == (3, 0)
    denoise(x, torch.full((2,), 0.4))
    assert (net.single, net.double) == (3, 1)
    assert torch.allclose(denoise(x, torch.tensor([0.1, 0.4])), torch.stack([2 * x[0], 4 * x[1]]))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, C, U = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2)
T = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


def norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def test_one_call_of_both_branches_equals_two() -> None:
    weight = draw(2, 2, seed=5)

    def pair(x: Tensor, t: Tensor) -> Tensor:
        flag = torch.cat([torch.ones(len(x) // 2), torch.zeros(len(x) // 2)]).double()
        return torch.einsum("oc,bchw->bohw", weight, x) + like(t + flag, x)

    one = guidance.batched(pair)
    two = guidance.sequential(*[lambda x, t, f=f: torch.einsum("oc,bchw->bohw", weight, x) + like(t + f, x) for f in (1, 0)])
    for a, b in zip(one(X, T), two(X, T), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_guidance_is_the_same_in_all_that_a_network_predicts() -> None:
    # What is affine in v at equal (x, t) may be guided before or after conversion.
    for kind in ("data", "noise", "score", "vp_velocity"):
        parts = [from_velocity(v, kind, X, T) for v in (C, U)]  # type: ignore[arg-type]
        guided = from_velocity(guidance.linear(3.0)(X, T, C, U), kind, X, T)  # type: ignore[arg-type]
        assert torch.allclose(guided, parts[1] + 3.0 * (parts[0] - parts[1]))


def test_rescaling_gives_the_conditionals_spread() -> None:
    rule = guidance.linear(5.0)
    assert torch.allclose(guidance.rescaled(rule, 1.0)(X, T, C, U).flatten(1).std(1), C.flatten(1).std(1))
    assert torch.allclose(guidance.rescaled(rule, 0.0)(X, T, C, U), rule(X, T, C, U))
    half = guidance.rescaled(rule, 0.5)(X, T, C, U)
    assert torch.allclose(half, (rule(X, T, C, U) + guidance.rescaled(rule, 1.0)(X, T, C, U)) / 2)


def test_renorming_is_a_limit_for_each_sample() -> None:
    small = C.clone()
    small[0] *= 100
    v = guidance.renormed(guidance.linear(3.0), 1.2)(X, T, small, torch.cat([0.9 * small[:1], U[1:]]))
    plain = guidance.linear(3.0)(X, T, small, torch.cat([0.9 * small[:1], U[1:]]))
    assert torch.allclose(norm(v)[1:], 1.2 * norm(small)[1:])
    assert torch.allclose(v[0], plain[0])


def test_projected_guidance_moves_across_the_data_and_no_farther_than_its_radius() -> None:
    rule = guidance.apg(4.0, radius=0.5)
    clean, moved = (from_velocity(v, "data", X, T) for v in (C, rule(X, T, C, U)))
    change = moved - clean
    assert float(((change * clean).flatten(1).sum(1) / norm(change) / norm(clean)).abs().max()) < 1e-10
    assert (norm(change) <= 3 * 0.5 + 1e-9).all()
    assert torch.allclose(guidance.apg(1.0)(X, T, C, U), C)
    free = guidance.apg(4.0, parallel=1.0, radius=1e9)(X, T, C, U)
    assert torch.allclose(free, guidance.linear(4.0)(X, T, C, U))


def test_projected_guidance_remembers_within_a_generation() -> None:
    rule = guidance.apg(2.0, parallel=1.0, radius=1e9, momentum=-0.5)
    first, second = rule(X, T, C, U) - C, rule(X, T, C, U) - C
    assert torch.allclose(second, first / 2)
    assert torch.allclose(guidance.apg(2.0, parallel=1.0, radius=1e9)(X, T, C, U) - C, first)


def test_zero_star_scales_the_second_branch_to_fit_the_first() -> None:
    rule = guidance.cfg_zero_star(3.0)
    assert torch.allclose(rule(X, T, 2 * U, U), 2 * U)
    assert torch.allclose(guidance.cfg_zero_star(1.0)(X, T, C, U), C)
    at_zero = guidance.cfg_zero_star(0.0)(X, T, C, U)
    assert float(((C - at_zero) * U).flatten(1).sum(1).abs().max()) < 1e-10
    assert not rule(X, torch.tensor([0.97, 0.99, 1.0]), C, U).any()


def test_skip_layer_adds_one_call_inside_its_band() -> None:
    calls = 0

    def skipped(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0 * x

    rule = guidance.skip_layer(guidance.linear(1.0), skipped, 0.5, (0.4, 0.9))
    assert torch.allclose(rule(X, torch.full((3,), 0.5), C, U), 1.5 * C)
    assert torch.allclose(rule(X, torch.full((3,), 0.2), C, U), C)
    assert calls == 1


def test_rules_compose_and_an_interval_costs_one_call_outside() -> None:
    net = Network()
    rule = guidance.renormed(guidance.rescaled(guidance.linear(3.0), 0.7))
    denoise = guidance.guided(net.conditional, net.both, rule, (0.2, 0.6))
    x = draw(2, 4)
    assert torch.equal(denoise(x, torch.full((2,), 0.9)), 2 * x)
    assert (net.single, net.double) == (1, 0)
    assert (norm(denoise(x, torch.full((2,), 0.4))) <= norm(2 * x) + 1e-12).all()
    assert (net.single, net.double) == (1, 1)


def test_thresholding_keeps_small_pictures_and_brings_large_ones_back() -> None:
    small = draw(2, 3, 8, 8).clamp(-1, 1)
    assert torch.equal(guidance.dynamic_threshold(small), small)
    large = guidance.dynamic_threshold(10 * draw(2, 3, 8, 8))
    assert float(large.abs().max()) == pytest.approx(1)
    assert float((large.abs() == 1).double().mean()) < 0.02


def test_arguments_are_named_with_their_range() -> None:
    for name, make in {
        "share": lambda: guidance.rescaled(guidance.linear(1.0), 1.5),
        "limit": lambda: guidance.renormed(guidance.linear(1.0), 0.0),
        "still": lambda: guidance.cfg_zero_star(2.0, still=1.5),
        "interval": lambda: guidance.skip_layer(guidance.linear(1.0), lambda x, t: x, 1.0, (0.2, 1.2)),
        "radius": lambda: guidance.apg(2.0, radius=-1.0),
        "quantile": lambda: guidance.dynamic_threshold(X, 2.0),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            make()
    net = Network()
    for interval in ((0.6, 0.2), (-0.1, 0.5), (0.0, float("nan"))):
        with pytest.raises(ValueError, match=r"interval must be two times that rise within \[0, 1\]"):
            guidance.cfg(net.conditional, net.both, 2.0, interval)


RULES = {
    "linear": lambda: guidance.linear(4.0),
    "rescaled": lambda: guidance.rescaled(guidance.linear(4.0), 0.7),
    "renormed": lambda: guidance.renormed(guidance.linear(4.0)),
    "apg": lambda: guidance.apg(4.0),
    "cfg_zero_star": lambda: guidance.cfg_zero_star(4.0),
    "rescaled cfg_zero_star": lambda: guidance.rescaled(guidance.cfg_zero_star(4.0)),
    "renormed cfg_zero_star": lambda: guidance.renormed(guidance.cfg_zero_star(4.0)),
    "skip_layer": lambda: guidance.skip_layer(guidance.linear(4.0), lambda x, t: 0.5 * x, 2.0),
}


@settings(deadline=None)
@given(name=st.sampled_from(sorted(RULES)), shape=SHAPES, dtype=DTYPES, t=TIMES, zeros=st.sampled_from(["none", "both", "second", "equal"]))
def test_every_rule_is_finite(name: str, shape: tuple[int, ...], dtype: torch.dtype, t: float, zeros: str) -> None:
    x, v_c, v_u = (normal(shape, dtype, seed) for seed in range(3))
    v_c = torch.zeros_like(v_c) if zeros == "both" else v_c
    v_u = v_c if zeros == "equal" else torch.zeros_like(v_u) if zeros in ("both", "second") else v_u
    rule, times = RULES[name](), torch.full(shape[:1], t, dtype=dtype)
    for _ in range(2):
        found = rule(x, times, v_c, v_u)
        assert found.shape == shape
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert torch.allclose(found, v_c, atol=1e-5) or zeros != "equal" or "zero" in name or name == "skip_layer"
    assert guidance.dynamic_threshold(v_c).abs().max() <= 1


def test_a_rule_does_not_depend_on_the_neighbours() -> None:
    for name, make in RULES.items():
        together = make()(X, T, C, U)
        for row in range(3):
            alone = make()(*(part[row : row + 1] for part in (X, T, C)), U[row : row + 1])
            assert torch.allclose(together[row], alone[0]), name
