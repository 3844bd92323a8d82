"""Sampling and rewards on a device that stands in for a GPU, as roll-outs call them there: in its own context, and in none."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import THERE, Elsewhere

from mezzotint.data.pairs import PairsConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.evals.students import path_straightness
from mezzotint.flow.guidance import RULES
from mezzotint.flow.solvers import SOLVERS
from mezzotint.pipeline import DiscretePath, Pipeline
from mezzotint.rewards import CreditConfig, JudgeConfig, LearnedConfig, PreferenceConfig, RewardModelConfig
from mezzotint.rewards.model import SmallEncoderConfig
from mezzotint.text import ByteEncoderConfig

CONTEXTS: tuple[Callable[[], Any], ...] = (nullcontext, lambda: torch.device(THERE))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws_elsewhere_what_it_draws_here(pipeline: Pipeline, solver: str) -> None:
    here = pipeline("a red star", 2, solver=solver)
    with Elsewhere():
        pipeline.to(THERE)
        for context in CONTEXTS:
            with context():
                there = pipeline("a red star", 2, solver=solver)
            assert torch.allclose(there, here, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_guides_elsewhere_as_here(pipeline: Pipeline, rule: str) -> None:
    pipeline.config.path = DiscretePath()
    here = pipeline("a red star", rule=rule, interval=(0.2, 0.8))
    with Elsewhere(), torch.device(THERE):
        assert torch.allclose(pipeline.to(THERE)("a red star", rule=rule, interval=(0.2, 0.8)), here, atol=1e-4)


def test_a_network_of_another_path_does_not_make_the_host_wait(pipeline: Pipeline) -> None:
    pipeline.config.path = DiscretePath()
    with Elsewhere() as elsewhere, torch.device(THERE), torch.no_grad():
        pipeline.to(THERE)
        cond = pipeline.encode(["a red star"])
        elsewhere.waits.clear()
        pipeline.velocity(torch.randn(1, 3, 32, 32), torch.rand(1), cond)
        assert not elsewhere.waits


def test_straightness_is_measured_elsewhere(pipeline: Pipeline) -> None:
    settings = pipeline.config.sampling
    here = path_straightness(pipeline, ["a red star"], settings, 0)
    with Elsewhere():
        assert path_straightness(pipeline.to(THERE), ["a red star"], settings, 0) == pytest.approx(here, rel=1e-3)


def test_rewards_follow_pictures(tmp_path: Path) -> None:
    model = RewardModelConfig(SmallEncoderConfig((8, 16), ByteEncoderConfig(width=16, heads=2))).build()
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path)
    batch = WorldsConfig().build().batch(0, 3)
    configs = (JudgeConfig(), CreditConfig(), PreferenceConfig(), LearnedConfig(str(tmp_path)))
    here = [config.build()(batch.images, batch.prompts) for config in configs]
    with Elsewhere(), torch.device(THERE):
        for config, scores in zip(configs, here, strict=True):
            there = config.build()(batch.images.to(THERE), batch.prompts)
            assert there.device == THERE
            assert torch.allclose(there.cpu(), scores, atol=1e-5)


def test_a_learned_reward_that_is_read_within_a_step_draws_nothing(tmp_path: Path) -> None:
    RewardModelConfig(SmallEncoderConfig((8, 16), ByteEncoderConfig(width=16, heads=2))).build().save(tmp_path)
    before = torch.get_rng_state()
    LearnedConfig(str(tmp_path)).build()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_draws_its_pairs_where_there_is_a_gpu(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save(tmp_path / "teacher")
    here = PairsConfig(str(tmp_path / "here"), str(tmp_path / "teacher"), number=2).build().batch(0, 2)
    monkeypatch.setattr("mezzotint.data.pairs.find_device", lambda: THERE)
    with Elsewhere():
        pairs = PairsConfig(str(tmp_path / "there"), str(tmp_path / "teacher"), number=2).build()
        there = pairs.batch(0, 2)
        assert pairs._teacher is not None
        assert next(pairs._teacher.parameters()).device == THERE
    assert torch.allclose(here.latents, there.latents, atol=1e-2)
