"""Solvers against exact flows: Gaussian data has a known velocity and a known map from noise to data."""

import math
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from exact import Gaussian, Mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, SHAPES, falling, normal
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


VARIANTS: dict[str, Solver] = {
    "churned": partial(solvers.edm, churn=20.0),
    "ddim": partial(solvers.ddim, eta=0.5),
    "sit": partial(solvers.flow_sde, law=solvers.sit()),
    "constant": partial(solvers.flow_sde, law=solvers.constant(0.5)),
    "cps": partial(solvers.flow_sde, law=solvers.cps()),
}
EVERY = {**SOLVERS, **VARIANTS}


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "flow_sde", "sit", "constant", "churned", "ddim"])
def test_stochastic_solvers_reach_the_mixture(name: str, size: int) -> None:
    data, count = Mixture(size), 10_000 if size == 2 else 1_000
    times = torch.cat([torch.ones(1), torch.sigmoid(torch.linspace(6, -6, 600)), torch.zeros(1)]).double()
    found = data.deviations(last(EVERY[name], data.velocity, start(count, size), times))
    assert max(abs(v) for v in found.values()) < 4.5, found


@pytest.mark.parametrize(("name", "order"), [("ddpm", 1), ("dpmpp_2m_sde", 2), ("flow_sde", 1), ("sit", 1), ("constant", 1), ("ddim", 1)])
def test_gaussian_data_shows_the_order_in_distribution(name: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The velocity is affine, so that a sample is affine in all the noise that made it: row 0 of x shows its mean, row 1 what the noise
    # at the start adds, row k + 1 what the k-th draw does. No estimate is involved.
    data, errors = Gaussian(2), []
    for steps in COUNTS:
        times, draws = inner_grid(steps), iter(range(2, steps + 2))

        def impulse(x: Tensor, _: object, draws: Iterator[int] = draws) -> Tensor:
            return torch.zeros_like(x).index_fill_(0, torch.tensor(next(draws)), 1.0)

        monkeypatch.setattr(solvers, "randn_like", impulse)
        x = ((1 - times[0]) * data.mean).repeat(steps + 2, 1)
        x[1] += data.spread(times[0])
        end = last(EVERY[name], data.velocity, x, times)
        spread = (end[1:] - end[0]).square().sum(0).sqrt()
        off = torch.cat([end[0] - (1 - times[-1]) * data.mean, spread - data.spread(times[-1])])
        errors.append(float(off.norm()))
    assert slope(errors, COUNTS) == pytest.approx(order, abs=0.2)


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
@given(name=st.sampled_from(sorted(EVERY)), shape=SHAPES, dtype=DTYPES, steps=st.integers(1, 100), ratio=st.floats(0.2, 8.0))
def test_every_solver_ends_in_finite_data(name: str, shape: tuple[int, ...], dtype: torch.dtype, steps: int, ratio: float) -> None:
    x, done = normal(shape, dtype), 0
    for step in EVERY[name](gaussian_velocity, x, grid(steps, ratio), generator=torch.Generator().manual_seed(1)):
        done += 1
        assert step.x.shape == step.x0.shape == x.shape
        assert step.x.dtype == step.x0.dtype == dtype
        assert step.x.isfinite().all()
        assert step.x0.isfinite().all()
    assert done == steps


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(EVERY)), times=falling())
def test_any_falling_grid_keeps_every_solver_finite(name: str, times: Tensor) -> None:
    # Standing still, steps of any size, both ends or neither.
    x = normal((4, 3), torch.float64)
    for step in EVERY[name](gaussian_velocity, x, times, generator=torch.Generator().manual_seed(1)):
        assert step.x.isfinite().all()


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_grid_that_stands_still_moves_nothing(name: str) -> None:
    x = normal((4, 3), torch.float64)
    for t in (0.0, 0.3, 1.0):
        if name == "consistency" and t > 0:
            continue  # it draws fresh noise on purpose
        assert torch.allclose(last(EVERY[name], gaussian_velocity, x, torch.full((4,), t)), x, atol=1e-12)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_what_was_yielded_or_given_is_not_written_over(name: str) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        v = gaussian_velocity(x, t)
        kept.extend([(x, x.clone()), (v, v.clone())])
        return v

    for step in EVERY[name](denoise, normal((2, 3), torch.float64), grid(6), generator=torch.Generator().manual_seed(0)):
        kept.extend([(step.x, step.x.clone()), (step.start, step.start.clone())])
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_gradients_flow_through_whole_trajectories(name: str) -> None:
    x, times = normal((2, 3), torch.float64), grid(6)

    def end(shift: Tensor) -> Tensor:
        return last(EVERY[name], lambda x, t: gaussian_velocity(x, t) + torch.sin(shift * x), x, times).square().sum()

    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(end(shift), shift)
    with torch.no_grad():
        expected = (end(shift + 1e-5) - end(shift - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_half_precision_is_sampled_in_float32(name: str) -> None:
    # The network may answer in bfloat16, and noise may come in it: the state stays in float32.
    def half(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == t.dtype == torch.float32
        return gaussian_velocity(x, t).bfloat16()

    x = normal((4, 3), torch.float32).bfloat16()
    steps = list(SOLVERS[name](half, x, grid(10), generator=torch.Generator().manual_seed(0)))
    assert all(step.x.dtype == step.x0.dtype == torch.float32 for step in steps)
    rounded = last(SOLVERS[name], lambda x, t: half(x, t).float(), x, grid(10))
    assert torch.allclose(last(SOLVERS[name], half, x, grid(10)), rounded, atol=1e-2)


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("times", [[], [1.0], [1.5, 0.0], [1.0, 0.2, 0.5], [0.5, -0.1], [1.0, float("nan")]])
def test_bad_times_are_named(name: str, times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"times must .*\[0, 1\]"):
        last(SOLVERS[name], gaussian_velocity, start(2, 2), torch.tensor(times))


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 5), (4, 2, 1, 1)])
def test_times_of_other_items_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="times must be"):
        last(solvers.euler, gaussian_velocity, start(2, 2), torch.linspace(1, 0, 4).reshape(4, *[1] * (len(shape) - 1)).expand(shape))


def test_other_arguments_are_named_with_their_range() -> None:
    x, times = start(2, 2), torch.linspace(1, 0, 3)
    with pytest.raises(ValueError, match=r"eta must be within \[0, 1\]"):
        last(partial(solvers.ddim, eta=1.5), gaussian_velocity, x, times)
    with pytest.raises(ValueError, match=r"iterations must be within \[1"):
        last(partial(solvers.invert, iterations=0), gaussian_velocity, x, times.flip(0))
    for name, make in {
        "churn": lambda: last(partial(solvers.edm, churn=-1.0), gaussian_velocity, x, times),
        "noise": lambda: last(partial(solvers.edm, noise=float("nan")), gaussian_velocity, x, times),
        "sigmas": lambda: last(partial(solvers.edm, sigmas=(2.0, 1.0)), gaussian_velocity, x, times),
        "level": lambda: solvers.grpo(-0.1),
        "norm": lambda: solvers.sit(-1.0),
        "g": lambda: solvers.constant(-1.0),
        "s": lambda: solvers.transition(x, x, torch.ones(2), 2 * torch.ones(2)),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be within"):
            make()
    with pytest.raises(ValueError, match=r"level must be within \[0, 1\]"):
        solvers.cps(1.2)
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


def test_the_laws_are_those_of_the_papers() -> None:
    t, s, z = torch.tensor([1.0, 0.8, 0.3]).double(), torch.tensor([0.9, 0.5, 0.1]).double(), start(3, 2)
    x, v = start(3, 2, seed=1), start(3, 2, seed=2)
    x0, eps = x - like(t, x) * v, x + like(1 - t, x) * v
    a, b, std = solvers.cps(0.8)(t, s)
    angle = torch.tensor(math.pi / 2 * 0.8).double()
    expected = like(1 - s, x) * x0 + like(s * angle.cos(), x) * eps + like(s * angle.sin(), x) * z
    assert torch.allclose(like(a, x) * x + like(b, x) * v + like(std, x) * z, expected)
    for law, g in (
        (solvers.grpo(0.7), 0.7 * (t / (1 - torch.tensor([0.9, 0.8, 0.3]))).sqrt()),
        (solvers.sit(), (2 * t).sqrt()),
        (solvers.constant(0.3), torch.full_like(t, 0.3)),
    ):
        a, b, std = law(t, s)
        dt, score = s - t, -eps / like(t, x)
        assert torch.allclose(std, g * (-dt).sqrt())
        assert torch.allclose(like(a, x) * x + like(b, x) * v, x + like(dt, x) * (v - like(g**2 / 2, x) * score))
    # The linear path's own SDE, reversed: f = -1 / (1 - t), g^2 = 2 t / (1 - t), drift f x - g^2 score.
    t, s, x, v = t[1:], s[1:], x[1:], v[1:]
    a, b, _ = solvers.grpo(math.sqrt(2))(t, s)
    drift = -x / like(1 - t, x) + like(2 / (1 - t), x) * (x + like(1 - t, x) * v)
    assert torch.allclose(like(a, x) * x + like(b, x) * v, x + like(s - t, x) * drift)


def test_preserved_coefficients_do_not_preserve_the_spread() -> None:
    # Its noise does not shrink with the step: on data with a spread samples stay too narrow, however many steps.
    for steps in (50, 400):
        found = last(VARIANTS["cps"], gaussian_velocity, start(4000, 1), grid(steps)).std()
        assert float(found) < 0.9 * STD
    assert float(last(VARIANTS["sit"], gaussian_velocity, start(4000, 1), grid(400)).std()) == pytest.approx(STD, rel=0.05)


def test_churn_raises_sigma_by_its_share_within_its_band() -> None:
    t, s = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.1]).double(), torch.tensor([0.9, 0.5, 0.4, 0.05, 0.1]).double()
    higher, keep, up = solvers._churned(t, s, 0.4, (0.5, 20.0))
    sigma = t / (1 - t)
    assert torch.allclose((higher / (1 - higher))[1:3], 1.4 * sigma[1:3])
    assert torch.equal(higher[[0, 3, 4]], t[[0, 3, 4]])
    assert not up[[0, 3, 4]].any()
    # In y = x / (1 - t): y + sqrt(higher sigma^2 - sigma^2) z.
    assert torch.allclose((keep / (1 - higher))[1:3], 1 / (1 - t[1:3]))
    assert torch.allclose((up / (1 - higher))[1:3], sigma[1:3] * math.sqrt(1.4**2 - 1))


def test_straightness_is_zero_on_straight_paths_and_the_integral_on_a_gaussian() -> None:
    times = torch.linspace(1, 0, 401, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    end = torch.randn(3, 5, dtype=torch.float64)
    assert float(solvers.straightness(lambda y, t: x - end, x, times[::40]).max()) < 1e-24
    data = Gaussian(5)
    # x_t = (1 - t) mean + spread(t) x: what bends is the spread, whose slope is (t - (1 - t) std^2) / spread(t).
    t = times[:, None]
    slope = (t - (1 - t) * data.std**2) / data.spread(t)
    exact = torch.trapezoid((slope - (1 - data.std)) ** 2, -times, dim=0)  # (5,)
    assert torch.allclose(solvers.straightness(data.velocity, x, times), (exact * x**2).mean(1), rtol=0.02)
