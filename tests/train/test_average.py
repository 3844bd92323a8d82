"""Moving averages: profiles in closed form, and averages of other lengths than those that were stored."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mezzotint.errors import UserError
from mezzotint.pipeline import load
from mezzotint.train.average import FOLDER, LONGEST, Average, coefficients, decay, gamma, product, reconstruct, snapshots
from mezzotint.train.trainer import RunConfig, Trainer

STEPS = 400


def profile(length: float, steps: int, total: int = STEPS) -> np.ndarray:
    """The weight of each step's weights in the average, by the decays themselves."""
    weights = np.zeros(total)
    for step in range(steps):
        d = decay(length, step)
        weights *= d
        weights[step] = 1 - d
    return weights


@pytest.mark.parametrize(("length", "expected"), [(0.05, 16.97), (0.10, 6.94)])  # as Karras et al. 2024 say in section 3.1
def test_gamma_is_the_published_one(length: float, expected: float) -> None:
    assert gamma(length) == pytest.approx(expected, abs=0.005)
    g = gamma(length)
    assert math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3)) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_the_spread_of_the_profile_is_the_length(length: float) -> None:
    weights, steps = profile(length, STEPS), np.arange(STEPS)
    assert weights.sum() == pytest.approx(1)
    mean = (weights * steps).sum()
    assert math.sqrt((weights * (steps - mean) ** 2).sum()) / STEPS == pytest.approx(length, rel=0.01)


def test_products_are_the_integrals() -> None:
    t = np.linspace(0, 300, 300_001)

    def p(end: int, g: float) -> np.ndarray:
        return np.where(t <= end, (g + 1) * t**g / end ** (g + 1.0), 0)

    for a, b in (((200, 6.94), (300, 16.97)), ((300, 6.94), (300, 6.94))):
        assert product(a, b) == pytest.approx(np.trapezoid(p(*a) * p(*b), t), rel=1e-3)


@pytest.mark.parametrize("length", [0, -0.1, LONGEST + 0.01, math.nan])
def test_lengths_that_are_none_are_refused(length: float) -> None:
    with pytest.raises(ValueError, match="length must be above 0 and at most"):
        gamma(length)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[float, int], torch.Tensor]]:
    """Weights on a random walk: the folder of what two tracked averages stored, and other lengths tracked all the way."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("averages")
    net = nn.Linear(256, 1, bias=False)
    stored = Average(net, 0.0, (0.05, 0.1))
    direct = {length: Average(net, 0.0, (length,)) for length in (0.05, 0.07, 0.14, 0.2)}
    tracked = {}
    for step in range(STEPS):
        with torch.no_grad():
            net.weight += torch.randn_like(net.weight)
        for average in (stored, *direct.values()):
            average.update(net, step)
        if (step + 1) % 25 == 0:
            stored.store(folder, step + 1)
            tracked |= {(length, step + 1): a.shown.weight.clone() for length, a in direct.items()}  # type: ignore[misc, operator]
    tracked[0.0, STEPS] = net.weight.detach().clone()
    return folder, tracked


def test_any_length_is_found_after_the_run(walk: tuple[Path, dict[tuple[float, int], torch.Tensor]]) -> None:
    folder, tracked = walk
    assert len(snapshots(folder)) == 2 * STEPS // 25
    for (length, step), expected in tracked.items():
        if length and step in (200, STEPS):
            found, distance = reconstruct(folder, length, step)
            error = float((found["weight"] - expected).norm() / expected.norm())
            assert error < 0.02, (length, step, error)
            assert distance < 0.1
    apart = float((tracked[0.07, STEPS] - tracked[0.14, STEPS]).norm() / tracked[0.14, STEPS].norm())
    assert apart > 0.05, "the lengths differ by more than the error"


def test_what_was_stored_is_found_exactly(walk: tuple[Path, dict[tuple[float, int], torch.Tensor]]) -> None:
    folder, tracked = walk
    found, distance = reconstruct(folder, 0.05)
    assert torch.allclose(found["weight"], tracked[0.05, STEPS], rtol=1e-4, atol=1e-4)
    assert distance < 1e-5


def test_a_length_out_of_reach_is_said_to_be() -> None:
    weights, distance = coefficients([(100, 0.05), (100, 0.1)], (100, 0.005))
    assert distance > 0.5
    assert all(math.isfinite(weight) for weight in weights)


def test_averages_of_a_stopped_run_are_those_of_a_whole_one(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_config(evaluate=6, preview_prompts=())
    config.optim = config.optim.replace(lengths=(0.05, 0.1), snapshot=3)
    Trainer(config, tmp_path / "whole").run()
    first = Trainer(config, tmp_path / "parts")
    first._open()
    first.chores.open()
    for _ in range(4):
        logged, _ = first._train_step()
        first.step, first.seconds = first.step + 1, first.seconds + 0.01
        first._after_step(logged, stopping=False)
    last = Trainer(config, tmp_path / "parts")
    last.run()
    whole, parts = (snapshots(tmp_path / name / FOLDER / "student") for name in ("whole", "parts"))
    assert [(s.step, s.length) for s in whole] == [(3, 0.05), (3, 0.1), (6, 0.05), (6, 0.1)]
    for a, b in zip(whole, parts, strict=True):
        assert a.path.read_bytes() == b.path.read_bytes()
    exported, stored = load(tmp_path / "whole").state_dict(), load_file(whole[2].path)
    assert all(torch.equal(exported[name], stored[name]) for name in stored), "the first length is the one that is seen"


def test_nothing_stored_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no averages in .*--optim.lengths 0.05 0.1"):
        reconstruct(tmp_path, 0.1)
    Average(nn.Linear(2, 2), 0.0, (0.1,)).store(tmp_path, 50)
    with pytest.raises(UserError, match=r"first stored average .* is of step 50"):
        reconstruct(tmp_path, 0.1, 20)
