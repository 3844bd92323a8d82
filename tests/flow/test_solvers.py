"""Solvers against exact flows: Gaussian data has a known velocity and a known map from noise to data."""

import math

import pytest
import torch
from torch import Tensor

from mezzotint.flow.path import like
from mezzotint.flow.solvers import SOLVERS, consistency, network_calls, randn_like
from mezzotint.flow.time import grid

MEAN, STD = 0.5, 0.6


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x0 | x_t = x] for x0 ~ N(MEAN, STD^2)."""
    t = like(t, x)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def error(name: str, steps: int) -> float:
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    *_, last = SOLVERS[name](gaussian_velocity, noise, times)
    return float((last.x - (MEAN + STD * noise)).abs().mean())


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("heun", 2.0), ("dpmpp_2m", 1.4)])
def test_error_falls_at_the_solvers_order(name: str, order: float) -> None:
    # The first-order end steps cap what DPM-Solver++(2M) can show on this grid.
    counts = [16, 32, 64, 128]
    errors = [error(name, n) for n in counts]
    slope = math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])
    assert slope == pytest.approx(order, abs=0.25) if order != 1.4 else slope > 1.2


@pytest.mark.parametrize("name", SOLVERS)
def test_network_calls_are_what_is_called(name: str) -> None:
    calls = 0

    def counting(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gaussian_velocity(x, t)

    for _ in SOLVERS[name](counting, torch.randn(2, 3), grid(7)):
        pass
    assert calls == network_calls(name, 7)


def test_second_order_beats_first_at_equal_calls() -> None:
    assert error("dpmpp_2m", 16) < error("euler", 16) / 2
    assert error("heun", 8) < error("euler", 16) / 2


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_a_straight_flow_is_solved_exactly(name: str) -> None:
    # One data point: the velocity at (x, t) is (x - x0) / t, and every path ends there.
    x0 = torch.tensor([[1.0, -2.0]])
    generator = torch.Generator().manual_seed(0)
    *_, last = SOLVERS[name](lambda x, t: (x - x0) / like(t, x), torch.randn(5, 2), grid(4), generator=generator)
    assert torch.allclose(last.x, x0.expand(5, 2), atol=1e-5)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_step_is_yielded_with_its_clean_estimate(name: str) -> None:
    steps = list(SOLVERS[name](gaussian_velocity, torch.randn(2, 3), grid(6), generator=torch.Generator().manual_seed(0)))
    assert len(steps) == 6
    assert [float(s.t[0]) for s in steps] == pytest.approx(grid(6)[1:].tolist())
    assert all(s.x.shape == s.x0.shape == (2, 3) and s.x.isfinite().all() for s in steps)


def test_consistency_sampling_reaches_the_data_distribution() -> None:
    def to_data(x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the exact consistency function of Gaussian data."""
        t = like(t, x)
        clean = MEAN + STD * (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
        return (x - clean) / t

    *_, last = consistency(to_data, torch.randn(20_000, 1), grid(4), generator=torch.Generator().manual_seed(0))
    assert float(last.x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(last.x.std()) == pytest.approx(STD, abs=0.02)


def test_a_rows_noise_does_not_depend_on_its_neighbours() -> None:
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    together = randn_like(torch.empty(3, 4), seeded(1, 2, 3))
    assert torch.equal(together[1:2], randn_like(torch.empty(1, 4), seeded(2)))
    with pytest.raises(ValueError, match="generator"):
        randn_like(torch.empty(3, 4), seeded(1))
