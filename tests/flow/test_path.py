"""The linear path and its conversions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.flow.path import from_velocity, interpolate, like, log_snr, to_velocity

KINDS = ("velocity", "data", "noise", "score")


def test_data_is_at_zero_and_noise_at_one() -> None:
    x0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(interpolate(x0, eps, torch.zeros(2)), x0)
    assert torch.allclose(interpolate(x0, eps, torch.ones(2)), eps, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, eps = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    t, h = torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-6
    slope = (interpolate(x0, eps, t + h) - interpolate(x0, eps, t - h)) / (2 * h)
    assert torch.allclose(slope, eps - x0, atol=1e-8)


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
