"""Densities of training times and the sampler's grid."""

import math

import pytest
import torch

from mezzotint.flow.time import TimeDensity, grid, logit_normal, shift, stratified


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
