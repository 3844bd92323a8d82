"""Solvers against exact flows: Gaussian data has a known velocity and a known map from noise to data."""

from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from exact import Gaussian, Mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.flow import solvers
from mezzotint.flow.path import interpolate, like
from mezzotint.flow.solvers import SOLVERS, Solver, consistency, network_calls, randn_like
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


COUNTS = [24, 32, 48, 64, 96]
DETERMINISTIC = ("euler", "heun", "edm", "dpmpp_2m", "unipc")


def slope(errors: list[float], counts: list[int]) -> float:
    """The order that a straight line through log error over log count shows."""
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / (x * x).sum())


def inner_grid(steps: int) -> Tensor:
    """Even steps in log((1 - t) / t) between 0.97 and 0.03, free of the ends' infinite steps."""
    return torch.sigmoid(torch.linspace(3.5, -3.5, steps + 1, dtype=torch.float64))


def start(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def last(solver: Solver, denoise: solvers.Denoise, x: Tensor, times: Tensor) -> Tensor:
    *_, step = solver(denoise, x, times, generator=torch.Generator().manual_seed(1))
    return step.x


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("edm", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_gaussian_data_shows_the_order(name: str, order: int, size: int) -> None:
    data, x, errors = Gaussian(size), start(32, size), []
    for steps in COUNTS:
        times = inner_grid(steps)
        errors.append(float((last(SOLVERS[name], data.velocity, x, times) - data.move(x, times[0], times[-1])).norm()))
    assert slope(errors, COUNTS) == pytest.approx(order, abs=0.2)


@cache
def fine_mixture() -> Tensor:
    """Where the mixture's flow takes 32 points, by the order-2 reference at 3,000 steps."""
    return last(SOLVERS["heun"], Mixture(2).velocity, start(32, 2), inner_grid(3000))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("edm", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_mixture_data_shows_the_order(name: str, order: int) -> None:
    data, x = Mixture(2), start(32, 2)
    exact = fine_mixture()
    errors = [float((last(SOLVERS[name], data.velocity, x, inner_grid(n)) - exact).norm()) for n in [48, 64, 96, 128, 192]]
    assert slope(errors, [48, 64, 96, 128, 192]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "flow_sde", "churned", "ddim"])
def test_stochastic_solvers_reach_the_mixture(name: str, size: int) -> None:
    data, solver = Mixture(size), {**SOLVERS, "churned": partial(solvers.edm, churn=20.0), "ddim": partial(solvers.ddim, eta=0.5)}[name]
    count = 10_000 if size == 2 else 1_000
    times = torch.cat([torch.ones(1), torch.sigmoid(torch.linspace(6, -6, 600)), torch.zeros(1)]).double()
    found = data.deviations(last(solver, data.velocity, start(count, size), times))
    assert max(abs(v) for v in found.values()) < 4.5, found


def test_the_comparison_rejects_too_much_noise() -> None:
    # Planted: every step of ancestral sampling draws 5% more noise than it should.
    data, times = Mixture(2), torch.cat([torch.ones(1), torch.sigmoid(torch.linspace(6, -6, 600)), torch.zeros(1)]).double()
    generator, x = torch.Generator().manual_seed(1), start(10_000, 2)
    for t, s in pairwise(times):
        below, keep, up = solvers._ancestral(t, s, 1.0)
        x = keep * (x + (below - t) * data.velocity(x, t.expand(len(x))))
        x = x + 1.05 * up * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    assert max(abs(v) for v in data.deviations(x).values()) > 6


def policy_step() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, v, times = start(4, 3, 2), start(4, 3, 2, seed=1), torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64)
    return x, v, times, times - 0.1, start(4, 3, 2, seed=2)


def test_log_prob_is_that_of_the_normal_distribution() -> None:
    x, v, t, s, z = policy_step()
    mean, std = solvers.transition(x, v, t, s)
    after = mean + like(std, x) * z
    expected = torch.distributions.Normal(mean, like(std, x).expand_as(x)).log_prob(after).flatten(1).mean(1)
    assert torch.allclose(solvers.log_prob(after, mean, std), expected, rtol=1e-12)


def test_kl_is_the_closed_form_and_a_monte_carlo_estimate() -> None:
    x, v, t, s, z = policy_step()
    reference = v + 3 * z
    (mean, std), (other, _) = solvers.transition(x, v, t, s), solvers.transition(x, reference, t, s)
    exact = solvers.kl(mean, other, std)
    g, dt = std / (t - s).sqrt(), t - s
    in_velocity = dt / 2 * (1 / g + g * (1 - t) / (2 * t)) ** 2 * ((v - reference) ** 2).flatten(1).mean(1)
    assert torch.allclose(exact, in_velocity, rtol=1e-9)
    for row in range(4):
        spread = std[row].expand(4000)
        drawn = mean[row] + std[row] * start(4000, 3, 2, seed=row)
        ratio = solvers.log_prob(drawn, mean[row], spread) - solvers.log_prob(drawn, other[row], spread)
        error = float(ratio.std()) / 4000**0.5
        assert float(ratio.mean()) == pytest.approx(float(exact[row]), abs=4.5 * error)
        assert float(ratio.mean()) != pytest.approx(1.5 * float(exact[row]), abs=4.5 * error)
    for function in (solvers.log_prob, solvers.kl):
        with pytest.raises(ValueError, match="std"):
            function(mean, other, torch.zeros_like(std))


def test_a_policy_without_noise_is_euler() -> None:
    data, x, times = Gaussian(2), start(5, 2), torch.linspace(1, 0, 11, dtype=torch.float64)
    ends = [last(f, data.velocity, x, times) for f in (SOLVERS["euler"], partial(solvers.flow_sde, law=solvers.grpo(0.0)), solvers.ddim)]
    assert torch.allclose(ends[0], ends[1], atol=1e-12)
    assert torch.equal(ends[0], ends[2])


def test_the_rollouts_own_steps_have_the_density_that_drew_them() -> None:
    data, times = Gaussian(2), torch.linspace(1, 0, 11, dtype=torch.float64)
    steps = list(solvers.flow_sde(data.velocity, start(2000, 2), times, generator=torch.Generator().manual_seed(0)))
    drawn = []
    for step in steps[:-1]:
        mean, std = solvers.transition(step.start, data.velocity(step.start, step.start_t), step.start_t, step.t)
        drawn.append((step.x - mean) / like(std, mean))
    assert float(torch.stack(drawn).std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_inversion_returns_the_noise_at_the_solvers_order(name: str, order: int) -> None:
    data, x, errors = Gaussian(3), start(16, 3), []
    for steps in COUNTS:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        clean = last(SOLVERS[name], data.velocity, x, times)
        errors.append(float((last(SOLVERS[name], data.velocity, clean, times.flip(0)) - x).norm()))
    assert slope(errors, COUNTS) == pytest.approx(order, abs=0.25)


def test_fixed_point_inversion_returns_the_noise() -> None:
    data, x, times = Mixture(3), start(16, 3), torch.linspace(1, 0, 51, dtype=torch.float64)
    clean = last(SOLVERS["euler"], data.velocity, x, times)
    back = last(partial(solvers.invert, iterations=12), data.velocity, clean, times.flip(0))
    assert float((back - x).abs().max()) < 1e-6
    assert float((last(SOLVERS["euler"], data.velocity, clean, times.flip(0)) - x).abs().max()) > 1e-3


def test_likelihood_of_gaussian_data() -> None:
    data = Gaussian(1)
    x = data.mean + data.std * start(8, 1)
    expected = torch.distributions.Normal(data.mean, data.std).log_prob(x)[:, 0]
    errors = [
        float((solvers.log_likelihood(data.velocity, x, torch.linspace(0, 1, n + 1, dtype=torch.float64)) - expected).norm())
        for n in COUNTS
    ]
    assert errors[-1] < 1e-3
    assert slope(errors, COUNTS) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_items_and_frames_with_times_of_their_own(name: str) -> None:
    # Three clocks: one that runs, one that waits in noise first, one that is done early and stands at data.
    run = torch.linspace(1, 0, 9, dtype=torch.float64)
    own = torch.stack([run, torch.cat([run[:1].expand(4), run[:-4]]), torch.cat([run[4:], run[-1:].expand(4)])], 1)
    x = start(3, 2)
    x[2] = 0.3
    together = last(SOLVERS[name], gaussian_velocity, x, own)
    for row in range(3):
        alone = last(SOLVERS[name], gaussian_velocity, x[row : row + 1], own[:, row])
        assert torch.allclose(together[row], alone[0], atol=1e-12)
    assert torch.allclose(together[0], last(SOLVERS[name], gaussian_velocity, x, run)[0], atol=1e-12)
    video = start(2, 3, 4, 2, 2)
    frames = run[:, None, None, None].expand(-1, 2, 1, 4) * torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    ends = last(SOLVERS[name], gaussian_velocity, video, frames)
    for frame in range(4):
        alone = last(SOLVERS[name], gaussian_velocity, video[:, :, frame], frames[:, 0, 0, frame])
        assert torch.allclose(ends[:, :, frame], alone, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(SOLVERS)),
    shape=st.one_of(st.tuples(*[st.integers(1, 3)] * 4), st.tuples(*[st.integers(1, 3)] * 5)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    steps=st.integers(1, 100),
    ratio=st.floats(0.2, 8.0),
)
def test_every_solver_ends_in_finite_data(name: str, shape: tuple[int, ...], dtype: torch.dtype, steps: int, ratio: float) -> None:
    x, done = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)), 0
    for step in SOLVERS[name](gaussian_velocity, x, grid(steps, ratio), generator=torch.Generator().manual_seed(1)):
        done += 1
        assert step.x.shape == step.x0.shape == x.shape
        assert step.x.dtype == step.x0.dtype == dtype
        assert step.x.isfinite().all()
        assert step.x0.isfinite().all()
    assert done == steps


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("times", [[1.0], [1.5, 0.0], [1.0, 0.2, 0.5], [0.5, -0.1], [1.0, float("nan")]])
def test_bad_times_are_named(name: str, times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"times must .*\[0, 1\]"):
        last(SOLVERS[name], gaussian_velocity, start(2, 2), torch.tensor(times))


def test_other_arguments_are_named_with_their_range() -> None:
    x, times = start(2, 2), torch.linspace(1, 0, 3)
    with pytest.raises(ValueError, match=r"eta must be within \[0, 1\]"):
        last(partial(solvers.ddim, eta=1.5), gaussian_velocity, x, times)
    with pytest.raises(ValueError, match=r"iterations must be within \[1"):
        last(partial(solvers.invert, iterations=0), gaussian_velocity, x, times.flip(0))
    with pytest.raises(ValueError, match="times must rise"):
        last(solvers.invert, gaussian_velocity, x, times)
    with pytest.raises(ValueError, match="times must fall"):
        last(solvers.unipc, gaussian_velocity, x, times.flip(0))


def test_consistency_adds_noise_of_the_time_it_returns_to() -> None:
    x = start(4000, 1)
    first = next(iter(consistency(lambda x, t: x - 1, x, torch.tensor([1.0, 0.4, 0.0]), generator=torch.Generator().manual_seed(0))))
    assert torch.allclose(first.x0, torch.ones_like(x))
    assert float(first.x.std()) == pytest.approx(0.4, abs=0.02)
    assert float(first.x.mean()) == pytest.approx(float(interpolate(torch.ones(1), torch.zeros(1), torch.tensor([0.4]))), abs=0.03)
