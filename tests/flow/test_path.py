"""Paths, their coefficients, and the conversions between what networks predict."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, SHAPES, TIMES, normal
from torch import Tensor

from mezzotint.flow import path
from mezzotint.flow.path import Path, Point, from_linear, from_velocity, interpolate, like, log_snr, to_linear, to_velocity

KINDS = ("velocity", "data", "noise", "score", "vp_velocity")
PATHS: dict[str, Path] = {
    "linear": path.linear,
    "vp_linear": path.vp_linear,
    "vp_scaled_linear": path.vp_scaled_linear,
    "vp_cosine": path.vp_cosine,
    "vp_shifted_cosine": lambda u: path.vp_shifted_cosine(u, 0.5),
    "trigflow": path.trigflow,
    "edm": path.edm,
    "zero_terminal": path.zero_terminal_snr(path.vp_scaled_linear),
}
PRESERVING = [name for name in PATHS if name not in ("linear", "edm")]
TABLES = [path.ddpm_table(), path.scaled_linear_table(), path.cosine_table()]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_data_is_at_zero_and_noise_at_one() -> None:
    x0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(interpolate(x0, eps, torch.zeros(2)), x0)
    assert torch.allclose(interpolate(x0, eps, torch.ones(2)), eps, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, eps = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    t, h = torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-6
    slope = (interpolate(x0, eps, t + h) - interpolate(x0, eps, t - h)) / (2 * h)
    assert torch.allclose(slope, eps - x0, atol=1e-8)


@settings(deadline=None)
@given(t=st.floats(0.002, 0.998), kind=st.sampled_from(KINDS))
def test_every_conversion_comes_back(t: float, kind: str) -> None:
    torch.manual_seed(0)
    x, v = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    times = torch.full((3,), t, dtype=torch.float64)
    back = to_velocity(from_velocity(v, kind, x, times), kind, x, times)  # type: ignore[arg-type]
    assert torch.allclose(back, v, rtol=1e-10, atol=1e-10)


def test_conversions_recover_what_made_the_point() -> None:
    x0, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    x, v = interpolate(x0, eps, t), eps - x0
    assert torch.allclose(from_velocity(v, "data", x, t), x0)
    assert torch.allclose(from_velocity(v, "noise", x, t), eps)
    # The conditional score of a Gaussian: -(x - (1 - t) x0) / t^2.
    assert torch.allclose(from_velocity(v, "score", x, t), -(x - like(1 - t, x) * x0) / like(t, x) ** 2)


def test_errors_of_data_and_velocity_differ_by_the_time() -> None:
    x, v, wrong = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 6)
    t = torch.tensor([0.2, 0.5, 0.9])
    data_error = from_velocity(v + wrong, "data", x, t) - from_velocity(v, "data", x, t)
    assert torch.allclose(data_error, -like(t, x) * wrong, atol=1e-5)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="'flow'"):
        to_velocity(torch.zeros(1, 1), "flow", torch.zeros(1, 1), torch.zeros(1))  # type: ignore[arg-type]


def test_log_snr_falls_from_data_to_noise() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert (log_snr(t).diff() < 0).all()
    assert torch.allclose(log_snr(t).exp(), (1 - t) / t)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_the_coefficients(name: str) -> None:
    u, h = torch.linspace(0.01, 0.99, 99, dtype=torch.float64), 1e-6
    before, here, after = (PATHS[name](u + shift) for shift in (-h, 0.0, h))
    for slope, low, high in ((here.d_alpha, before.alpha, after.alpha), (here.d_sigma, before.sigma, after.sigma)):
        assert torch.allclose(slope, (high - low) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PATHS)
def test_paths_run_from_data_to_noise_and_are_finite_at_both_ends(name: str, dtype: torch.dtype) -> None:
    point = PATHS[name](torch.linspace(0, 1, 501, dtype=dtype))
    assert all(part.isfinite().all() for part in point)
    assert (point.t.diff() > 0).all()
    assert float(point.t[0]) < 0.003
    assert float(point.t[-1]) > 0.9
    if name in PRESERVING:
        assert torch.allclose(point.alpha**2 + point.sigma**2, torch.ones_like(point.alpha))
    if name in ("linear", "vp_cosine", "vp_shifted_cosine", "trigflow", "zero_terminal"):
        assert float(point.t[-1]) == pytest.approx(1, abs=1e-6)


@settings(deadline=None)
@given(u=st.floats(0.001, 0.999), name=st.sampled_from(sorted(PATHS)), kind=st.sampled_from(KINDS), other=st.sampled_from(KINDS))
def test_every_conversion_comes_back_on_every_path(u: float, name: str, kind: str, other: str) -> None:
    x, prediction = draw(3, 2, 4, seed=1), draw(3, 2, 4, seed=2)
    point = PATHS[name](torch.full((3,), u, dtype=torch.float64))
    there = from_linear(to_linear(prediction, kind, x, point), other, x, point)  # type: ignore[arg-type]
    back = from_linear(to_linear(there, other, x, point), kind, x, point)  # type: ignore[arg-type]
    assert float((back - prediction).norm() / prediction.norm()) < 1e-9
    same = from_linear(to_linear(prediction, kind, x, point), kind, x, point)  # type: ignore[arg-type]
    assert float((same - prediction).abs().max()) < 1e-10


@pytest.mark.parametrize("name", PATHS)
def test_conversions_recover_what_made_the_point_on_every_path(name: str) -> None:
    x0, eps = draw(5, 3, seed=1), draw(5, 3, seed=2)
    point = PATHS[name](torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
    alpha, sigma, d_alpha, d_sigma = (like(part, x0) for part in point)
    x = alpha * x0 + sigma * eps
    truth = {
        "velocity": d_alpha * x0 + d_sigma * eps,
        "data": x0,
        "noise": eps,
        "score": -(x - alpha * x0) / sigma**2,
        "vp_velocity": (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt(),
    }
    for kind, prediction in truth.items():
        v = to_linear(prediction, kind, x, point)  # type: ignore[arg-type]
        assert torch.allclose(v, eps - x0, rtol=1e-8, atol=1e-8), kind
        assert torch.allclose(from_linear(eps - x0, kind, x, point), prediction, rtol=1e-8, atol=1e-8), kind  # type: ignore[arg-type]


def test_conversions_are_finite_and_right_at_the_ends() -> None:
    x0, eps = draw(2, 3, seed=1), draw(2, 3, seed=2)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for kind in KINDS:
        for x, t in ((x0, zero), (eps, one)):
            assert from_velocity(eps - x0, kind, x, t).isfinite().all()  # type: ignore[arg-type]
            assert to_velocity(draw(2, 3), kind, x, t).isfinite().all()  # type: ignore[arg-type]
    assert torch.equal(from_velocity(eps - x0, "data", x0, zero), x0)
    assert torch.allclose(from_velocity(eps - x0, "noise", x0, zero), eps)
    assert torch.allclose(from_velocity(eps - x0, "data", eps, one), x0)
    assert torch.allclose(from_velocity(eps - x0, "score", eps, one), -eps)
    assert torch.allclose(from_velocity(eps - x0, "vp_velocity", eps, one), -x0)
    assert torch.allclose(to_velocity(eps, "vp_velocity", x0, zero), eps - x0)
    assert torch.allclose(to_velocity(x0, "data", eps, one), eps - x0)


@pytest.mark.parametrize("name", PATHS)
def test_own_time_inverts_a_path(name: str) -> None:
    u = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    assert torch.allclose(path.own_time(PATHS[name], PATHS[name](u).t), u, atol=1e-10)


def test_frames_of_a_video_have_times_of_their_own() -> None:
    x0, eps, t = draw(2, 3, 4, 5, 5), draw(2, 3, 4, 5, 5, seed=1), torch.rand(2, 1, 4, dtype=torch.float64)
    x = interpolate(x0, eps, t)
    assert torch.allclose(x[1, :, 2], (1 - t[1, 0, 2]) * x0[1, :, 2] + t[1, 0, 2] * eps[1, :, 2])
    assert torch.allclose(from_velocity(eps - x0, "data", x, t), x0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_a_network_of_another_path_is_read_on_the_linear_one(name: str, kind: str) -> None:
    # Data of one point: the exact prediction of every kind is known on every path.
    x0 = draw(1, 6)

    def network(x: Tensor, u: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = (like(part, x) for part in PATHS[name](u))
        eps = (x - alpha * x0) / sigma
        v_vp = (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt()
        return {"velocity": d_alpha * x0 + d_sigma * eps, "data": x0, "noise": eps, "score": -eps / sigma, "vp_velocity": v_vp}[kind]

    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    eps = draw(3, 6, seed=3)
    denoise = path.from_continuous(network, PATHS[name], kind)  # type: ignore[arg-type]
    assert torch.allclose(denoise(interpolate(x0, eps, t), t), eps - x0, atol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "data", "vp_velocity", "score"])
@pytest.mark.parametrize("abar", TABLES)
def test_a_network_of_a_thousand_steps_is_read_at_continuous_times(abar: Tensor, kind: str) -> None:
    x0, indices = draw(1, 6), []

    def network(x: Tensor, index: Tensor) -> Tensor:
        indices.append(index)
        a = like(abar[index.round().long()].sqrt(), x)
        b = (1 - a**2).sqrt()
        eps = (x - a * x0) / b
        return {"noise": eps, "data": x0.expand_as(x), "vp_velocity": a * eps - b * x0, "score": -eps / b}[kind]

    asked = torch.tensor([3, 250, 700])
    t = 1 / (1 + (abar[asked] / (1 - abar[asked])).sqrt())
    eps = draw(3, 6, seed=3)
    denoise = path.from_discrete(network, abar, kind)  # type: ignore[arg-type]
    assert torch.allclose(denoise(interpolate(x0, eps, t), t), eps - x0, atol=1e-8)
    assert torch.allclose(indices[0], asked.double(), atol=1e-8)
    between = path.from_discrete(lambda x, i: indices.append(i) or x, abar, "data")  # type: ignore[func-returns-value]
    between(eps, (t + t[1]) / 2)
    assert (indices[-1].diff() > 0).all()
    assert between(eps, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).isfinite().all()
    assert indices[-1][0] == 0
    assert indices[-1][2] == len(abar) - 1


def test_a_table_that_ends_in_noise_refuses_noise_prediction() -> None:
    abar = path.zero_terminal_table(path.scaled_linear_table())
    assert abar[-1] == 0
    assert abar[0] == pytest.approx(float(path.scaled_linear_table()[0]), rel=1e-12)
    with pytest.raises(ValueError, match="noise"):
        path.from_discrete(lambda x, i: x, abar, "noise")
    with pytest.raises(ValueError, match="alphas_cumprod"):
        path.from_discrete(lambda x, i: x, abar.flip(0), "data")
    denoise = path.from_discrete(lambda x, i: -torch.ones_like(x), abar, "vp_velocity")
    assert torch.allclose(denoise(draw(1, 4), torch.ones(1, dtype=torch.float64)), draw(1, 4) - 1)


def test_tables_and_continuous_schedules_agree() -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:]
    for table, of in ((path.ddpm_table(), path.vp_linear), (path.scaled_linear_table(), path.vp_scaled_linear)):
        assert torch.allclose(table.sqrt(), of(u).alpha, atol=2e-3)
    assert torch.allclose(path.cosine_table()[:-1].sqrt(), path.vp_cosine(u).alpha[:-1], atol=1e-9)


def test_edm_preconditioning_makes_the_best_linear_network_zero() -> None:
    # For Gaussian data of spread sigma_data the denoiser is c_skip x: the raw network has nothing to add.
    t, x, std = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), draw(3, 5), 0.5
    v = path.from_edm(lambda x, c: torch.zeros_like(x), std)(x, t)
    slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    assert torch.allclose(v, like(slope, x) * x)
    seen: list[Tensor] = []
    path.from_edm(lambda x, c: seen.append(c) or x, std)(x, t)  # type: ignore[func-returns-value]
    assert torch.allclose(seen[0], (t / (1 - t)).log() / 4)


def test_log_snr_of_a_point_is_that_of_its_linear_time() -> None:
    point = path.edm(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    assert isinstance(point, Point)
    assert torch.allclose(point.log_snr, log_snr(point.t))
    assert float(path.edm(torch.ones(1)).sigma) == pytest.approx(80, rel=1e-5)
    half = path.vp_shifted_cosine(torch.tensor([0.5], dtype=torch.float64), 4.0)
    assert float(half.log_snr) == pytest.approx(-math.log(4))


@pytest.mark.parametrize("name", PATHS)
def test_coefficients_in_float32_are_right_near_data(name: str) -> None:
    u = torch.tensor([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    exact = PATHS[name](u.double())
    assert torch.allclose(PATHS[name](u).sigma.double(), exact.sigma, rtol=1e-5, atol=0)


def point_network(path_: Path, x0: Tensor) -> path.Network:
    """The exact noise prediction of data of one point on some path."""

    def network(x: Tensor, u: Tensor) -> Tensor:
        point = path_(u)
        return (x - like(point.alpha, x) * x0) / like(point.sigma, x)

    return network


@pytest.mark.parametrize("name", PATHS)
def test_beyond_its_noisy_end_a_path_leads_to_the_data_that_its_network_sees(name: str) -> None:
    x0, t = normal((3, 4), torch.float64), torch.tensor([0.9, 0.9999, 1.0], dtype=torch.float64)
    x = normal((3, 4), torch.float64, seed=1)
    denoise = path.from_continuous(point_network(PATHS[name], x0), PATHS[name], "noise")
    assert torch.allclose(from_velocity(denoise(x, t), "data", x, t), x0, atol=1e-6)


@pytest.mark.parametrize("abar", TABLES)
def test_beyond_its_noisy_end_a_table_leads_to_the_data_that_its_network_sees(abar: Tensor) -> None:
    x0, t = normal((2, 4), torch.float64), torch.tensor([0.99995, 1.0], dtype=torch.float64)
    x = normal((2, 4), torch.float64, seed=1)

    def network(x: Tensor, index: Tensor) -> Tensor:
        # Between two indices as our adapter reads them: linear in the time of the linear path.
        times = 1 / (1 + (abar / (1 - abar)).sqrt())
        low = index.floor().long().clamp_max(len(abar) - 2)
        where = like(times[low] + (index - low) * (times[low + 1] - times[low]), x)
        n = ((1 - where) ** 2 + where**2).sqrt()
        return (n * x - (1 - where) * x0) / where

    denoise = path.from_discrete(network, abar, "noise")
    assert torch.allclose(from_velocity(denoise(x, t), "data", x, t), x0, atol=1e-6)


def test_edms_network_leads_to_its_data_from_pure_noise() -> None:
    # With a raw network of zero the denoiser is c_skip x.
    x, t, std = normal((2, 4), torch.float64), torch.ones(2, dtype=torch.float64), 0.5
    sigma = (1 - path.T_MIN) / path.T_MIN
    v = path.from_edm(lambda x, c: torch.zeros_like(x), std)(x, t)
    assert torch.allclose(from_velocity(v, "data", x, t), std**2 / (sigma**2 + std**2) * x / path.T_MIN)


@settings(deadline=None)
@given(shape=SHAPES, dtype=DTYPES, kind=st.sampled_from(KINDS), t=TIMES)
def test_conversions_are_finite_on_their_domain(shape: tuple[int, ...], dtype: torch.dtype, kind: str, t: float) -> None:
    x, prediction, times = normal(shape, dtype), normal(shape, dtype, 1), torch.full(shape[:1], t, dtype=dtype)
    for convert in (to_velocity, from_velocity):
        found = convert(prediction, kind, x, times)  # type: ignore[arg-type]
        assert found.shape == shape
        assert found.dtype == dtype
        assert found.isfinite().all()
    assert interpolate(x, prediction, times).isfinite().all()


@settings(deadline=None, max_examples=50)
@given(
    shape=SHAPES,
    dtype=DTYPES,
    name=st.sampled_from(sorted(PATHS)),
    kind=st.sampled_from(KINDS),
    t=TIMES,
    source=st.sampled_from(["continuous", "discrete", "edm"]),
)
def test_networks_of_other_paths_are_finite_at_all_times(
    shape: tuple[int, ...], dtype: torch.dtype, name: str, kind: str, t: float, source: str
) -> None:
    def network(x: Tensor, u: Tensor) -> Tensor:
        assert x.isfinite().all()
        assert u.isfinite().all()
        assert u.dtype == dtype
        return 0.5 * x + 0.1

    x, times = normal(shape, dtype), torch.full(shape[:1], t, dtype=dtype)
    denoise = {
        "continuous": lambda: path.from_continuous(network, PATHS[name], kind),  # type: ignore[arg-type]
        "discrete": lambda: path.from_discrete(network, path.cosine_table(), kind),  # type: ignore[arg-type]
        "edm": lambda: path.from_edm(network),
    }[source]()
    v = denoise(x, times)
    assert v.shape == shape
    assert v.dtype == dtype
    assert v.isfinite().all()


def test_arguments_are_named_with_their_range() -> None:
    u, x, late = torch.tensor([0.5]), torch.zeros(1, 2), torch.tensor([1.5])
    for name, make in {
        "beta_min": lambda: path.vp_linear(u, beta_min=0.0),
        "beta_max": lambda: path.vp_scaled_linear(u, beta_max=math.nan),
        "offset": lambda: path.vp_cosine(u, 0.0),
        "ratio": lambda: path.vp_shifted_cosine(u, -1.0),
        "sigma_max": lambda: path.edm(u, sigma_max=0.001),
        "sigma_data": lambda: path.from_edm(lambda x, c: x, 0.0),
        "steps": lambda: path.ddpm_table(0),
        "cap": lambda: path.cosine_table(cap=1.5),
        "alphas_cumprod": lambda: path.zero_terminal_table(torch.tensor([0.5])),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            make()
    for bad in (late, -late, torch.tensor([math.nan])):
        for convert in (to_velocity, from_velocity):
            with pytest.raises(ValueError, match=r"t must be within \[0, 1\]"):
                convert(x, "velocity", x, bad)
        for path_ in PATHS.values():
            with pytest.raises(ValueError, match=r"u must be within \[0, 1\]"):
                path_(bad)
        for question in (log_snr, lambda t: interpolate(x, x, t), lambda t: path.own_time(path.linear, t)):
            with pytest.raises(ValueError, match=r"t must be within \[0, 1\]"):
                question(bad)
