"""Densities of training times and the sampler's grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, TIMES

from mezzotint.flow import time
from mezzotint.flow.path import from_velocity, interpolate, like
from mezzotint.flow.time import TimeDensity, grid, logit_normal, places, shift, stratified


@pytest.mark.parametrize("number", [1, 3, 8, 32])
def test_all_places_of_a_grid_are_as_likely_in_batches_of_any_size(number: int) -> None:
    torch.manual_seed(0)
    drawn = torch.stack([places(number, 8) for _ in range(3000)])
    shares = torch.bincount(drawn.flatten(), minlength=8) / drawn.numel()
    assert torch.allclose(shares, torch.full((8,), 1 / 8), atol=0.03)
    each = torch.stack([torch.bincount(row, minlength=8) for row in drawn])
    assert number < 8 or bool((each == number // 8).all())


def test_stratified_numbers_fall_one_into_each_stratum() -> None:
    torch.manual_seed(0)
    u = stratified(50)
    assert torch.equal((u * 50).long().sort().values, torch.arange(50))
    assert not torch.equal(u, u.sort().values)


def test_logit_normal_has_normal_logits() -> None:
    torch.manual_seed(0)
    logits = torch.logit(logit_normal(stratified(20_000).double(), mean=0.5, std=1.5))
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(logits.std()) == pytest.approx(1.5, abs=0.02)


def test_shifting_adds_to_the_logit_and_comes_back() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.allclose(torch.logit(shift(t, 3.0)), torch.logit(t) + math.log(3.0))
    assert torch.allclose(shift(shift(t, 3.0), 1 / 3.0), t)
    assert torch.equal(shift(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]))


def test_a_larger_mean_and_a_larger_ratio_mean_more_noise() -> None:
    torch.manual_seed(0)
    middle = TimeDensity().sample(4000).mean()
    assert TimeDensity(mean=1.0).sample(4000).mean() > middle + 0.1
    assert TimeDensity(ratio=3.0).sample(4000).mean() > middle + 0.1


def test_the_uniform_share_reaches_the_ends() -> None:
    torch.manual_seed(0)
    plain, mixed = TimeDensity().sample(10_000), TimeDensity(uniform=0.5).sample(10_000)
    assert float((plain < 0.02).float().mean()) < 0.001
    assert float((mixed < 0.02).float().mean()) == pytest.approx(0.01, abs=0.003)


def test_grid_runs_from_noise_to_data() -> None:
    times = grid(5, ratio=2.0)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    with pytest.raises(ValueError, match="steps"):
        grid(0)


U = torch.linspace(0.001, 0.999, 4001, dtype=torch.float64)


def logit_normal_density(t: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return (-((torch.logit(t) - mean) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi) * t * (1 - t))


def test_inverse_distributions_have_their_densities() -> None:
    # The slope of an inverse distribution function is one over the density there.
    densities = [
        (logit_normal(U, 0.4, 1.3), lambda t: logit_normal_density(t, 0.4, 1.3)),
        (time.cosmap(U), time.cosmap_weight),
        (time.edm_log_normal(U), lambda t: logit_normal_density(t, -1.2, 1.2)),
    ]
    for times, density in densities:
        slopes, middle = times.diff() / U.diff(), (times[1:] + times[:-1]) / 2
        inner = slice(40, -40)
        assert torch.allclose((slopes * density(middle))[inner], torch.ones_like(slopes)[inner], rtol=2e-3)


def test_edm_times_have_log_normal_sigma() -> None:
    t = time.edm_log_normal(U)
    assert torch.allclose((t / (1 - t)).log(), -1.2 + 1.2 * torch.special.ndtri(U), atol=1e-9)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 2 / (math.pi - 2)])
def test_mode_turns_over_once_and_stays_inside(scale: float) -> None:
    times = time.mode(torch.linspace(0, 1, 1001, dtype=torch.float64), scale)
    assert (times.diff() <= 1e-12).all()
    assert float(times[0]) == pytest.approx(1)
    assert float(times[-1]) == pytest.approx(0, abs=1e-12)
    middle = float(((times > 0.4) & (times < 0.6)).double().mean())
    assert middle == pytest.approx(0.2, abs=0.002) if scale == 0 else (middle > 0.2) == (scale > 0)


def test_ranks_share_the_strata() -> None:
    parts = []
    for rank in range(4):
        torch.manual_seed(rank)
        parts.append(stratified(16, rank, 4))
    assert torch.equal((torch.cat(parts) * 64).long().sort().values, torch.arange(64))


def test_stratification_takes_variance_out_of_a_mean() -> None:
    torch.manual_seed(0)
    plain = torch.stack([torch.rand(32).square().mean() for _ in range(200)]).std()
    even = torch.stack([stratified(32).square().mean() for _ in range(200)]).std()
    assert even < plain / 10


def test_the_sign_of_the_mean_is_more_noise_and_indexing_a_falling_table_turns_it() -> None:
    # The pitfall: u is drawn, and read as an index into a scheduler's falling table of times.
    table = torch.linspace(1, 0, 1000, dtype=torch.float64)
    t = logit_normal(U, mean=1.0)
    through_table = table[(t * 1000).long().clamp_max(999)]
    assert float(t.mean()) > 0.65
    assert float(through_table.mean()) < 0.35


def test_shifting_a_logit_normal_moves_its_mean() -> None:
    assert torch.allclose(shift(logit_normal(U, 0.3, 0.9), 3.0), logit_normal(U, 0.3 + math.log(3.0), 0.9))


def test_ratios_of_the_published_models() -> None:
    assert time.sd3_ratio(1024**2, 256**2) == pytest.approx(4)
    assert time.flux_ratio(256) == pytest.approx(math.exp(0.5))
    assert time.flux_ratio(4096) == pytest.approx(math.exp(1.15))
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    mu = math.log(time.flux_ratio(1024))
    assert torch.allclose(shift(t, math.exp(mu)), math.exp(mu) / (math.exp(mu) + (1 / t - 1)))
    assert time.flux_ratio(4096, (1024, 0.95), (4096, 2.05)) == pytest.approx(math.exp(2.05))


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_a_stretched_grid_ends_where_it_should(steps: int) -> None:
    times = time.stretched(grid(steps, 3.0).double())
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    if steps > 1:
        assert float(times[-2]) == pytest.approx(0.1)


def test_weights_are_those_of_the_papers_in_velocity() -> None:
    torch.manual_seed(0)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)
    x0, eps, wrong = torch.randn(3, 4, 6, dtype=torch.float64)
    x = interpolate(x0, eps, t)
    velocity = (wrong**2).mean(1)
    data = ((from_velocity(eps - x0 + wrong, "data", x, t) - x0) ** 2).mean(1)
    noise = ((from_velocity(eps - x0 + wrong, "noise", x, t) - eps) ** 2).mean(1)
    snr, sigma = ((1 - t) / t) ** 2, t / (1 - t)
    assert torch.allclose(time.min_snr(t) * velocity, snr.clamp_max(5) * data)
    assert torch.allclose(time.min_snr(t) * velocity, snr.clamp_max(5) / snr * noise)
    assert torch.allclose(time.truncated_snr(t) * velocity, snr.clamp_min(1) * data)
    assert torch.allclose(time.edm_weight(t) * velocity, (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * data)
    # SD3's view: -1/2 w lambda' on the noise's error with w = t / (1 - t) and lambda the logarithm of the SNR is the plain velocity loss.
    assert torch.allclose(velocity, t / (1 - t) * (1 / (t * (1 - t))) * noise)
    # The VP v-loss with min(SNR, gamma) / (SNR + 1) is the same again.
    v_vp = from_velocity(eps - x0 + wrong, "vp_velocity", x, t) - from_velocity(eps - x0, "vp_velocity", x, t)
    assert torch.allclose(time.min_snr(t) * velocity, snr.clamp_max(5) / (snr + 1) * (v_vp**2).mean(1))
    assert torch.allclose(time.sigma_sqrt(t), like(t, t) ** -2)


def test_times_and_weights_are_finite_on_their_domain() -> None:
    ends = torch.tensor([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0], dtype=torch.float64)
    weights = (time.min_snr, time.truncated_snr, time.edm_weight, time.sigma_sqrt, time.cosmap_weight)
    for function in (*weights, time.mode, time.cosmap, logit_normal):
        found = function(ends)
        assert found.isfinite().all()
        assert (found >= 0).all()


def test_arguments_are_named() -> None:
    for name, make in {
        "number": lambda: stratified(0),
        "rank": lambda: stratified(4, 2, 2),
        "scale": lambda: time.mode(U, 3.0),
        "size": lambda: time.sd3_ratio(0, 4),
        "tokens": lambda: time.flux_ratio(0),
        "last": lambda: time.stretched(grid(4), 1.0),
    }.items():
        with pytest.raises(ValueError, match=f"{name} "):
            make()


@settings(deadline=None)
@given(u=TIMES, dtype=DTYPES, mean=st.floats(-5, 5), std=st.floats(0.05, 5), scale=st.floats(-1, 1.75), ratio=st.floats(1e-3, 1e3))
def test_densities_stay_inside(u: float, dtype: torch.dtype, mean: float, std: float, scale: float, ratio: float) -> None:
    numbers = torch.tensor([u], dtype=dtype)
    for found in (
        logit_normal(numbers, mean, std),
        time.mode(numbers, scale),
        time.cosmap(numbers),
        time.edm_log_normal(numbers),
        shift(numbers, ratio),
    ):
        assert found.dtype == dtype
        assert 0 <= float(found) <= 1


@settings(deadline=None)
@given(ratio=st.floats(1e-3, 1e3), dtype=DTYPES, steps=st.integers(1, 100), last=st.floats(1e-3, 0.9))
def test_grids_end_at_noise_and_data_to_the_last_bit(ratio: float, dtype: torch.dtype, steps: int, last: float) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert torch.equal(shift(ends, ratio), ends)
    times = grid(steps, ratio)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    moved = time.stretched(times, last)
    assert moved[0] == 1
    assert moved[-1] == 0
    assert steps == 1 or float(moved[-2]) == pytest.approx(last, rel=1e-3)


def test_cosmap_ends_where_it_should_in_float32() -> None:
    assert time.cosmap(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_times_outside_are_named() -> None:
    for bad in (torch.tensor([1.5]), torch.tensor([-0.1]), torch.tensor([math.nan])):
        for name, functions in {
            "u": (logit_normal, time.mode, time.cosmap, time.edm_log_normal),
            "t": (lambda t: shift(t, 3.0), time.min_snr, time.truncated_snr, time.edm_weight, time.sigma_sqrt, time.cosmap_weight),
            "times": (time.stretched,),
        }.items():
            for function in functions:
                with pytest.raises(ValueError, match=rf"{name} must be within \[0, 1\]"):
                    function(bad)  # type: ignore[operator]
    for name, make in {
        "std": lambda: logit_normal(U, 0.0, 0.0),
        "ratio": lambda: shift(U, 0.0),
        "gamma": lambda: time.min_snr(U, math.nan),
        "uniform": lambda: TimeDensity(uniform=1.5).sample(3),
        "high": lambda: time.flux_ratio(300, (256, 0.5), (256, 1.0)),
        "times": lambda: time.stretched(U),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            make()
