"""The reward model from pairs: Bradley and Terry's loss where it is known, what is left out of it, and what comes out of a run."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.reward import BradleyTerry, BradleyTerryConfig, bradley_terry_loss
from mezzotint.pipeline import Pipeline
from mezzotint.rewards import LearnedConfig, RewardModelConfig
from mezzotint.rewards.model import SmallEncoderConfig
from mezzotint.rewards.pairs import held_out
from mezzotint.text import ByteEncoderConfig
from mezzotint.train.log import read
from mezzotint.train.trainer import RunConfig, Trainer

TINY = BradleyTerryConfig(RewardModelConfig(SmallEncoderConfig(widths=(8, 16), text=ByteEncoderConfig(width=16, heads=2))))
TURN = ("reward",)


@pytest.fixture
def method(pipeline: Pipeline) -> BradleyTerry:
    return TINY.build(pipeline)


def test_the_loss_is_minus_the_log_of_the_winners_probability() -> None:
    winner, loser = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.0, 0.5, 1.0])
    expected = [math.log(2), math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(2))]
    assert bradley_terry_loss(winner, loser).tolist() == pytest.approx(expected)


def test_it_starts_at_ln_2(pipeline: Pipeline) -> None:
    batch = WorldsConfig(pairs=True).build().batch(0, 8)
    loss, _ = TINY.replace(folds=1).build(pipeline).loss(batch, TURN, 0)  # which holds out none
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-6)
    loss, metrics = TINY.replace(folds=2).build(pipeline).loss(batch, TURN, 0)
    assert 0 < metrics["held_out"].sum() < 8
    assert float(loss.detach()) == pytest.approx(math.log(2) * float(1 - metrics["held_out"].mean()) / 0.5, rel=1e-6)


def test_a_pair_counts_alike_in_every_micro_batch(method: BradleyTerry) -> None:
    batch = WorldsConfig(pairs=True).build().batch(0, 64)
    assert batch.rejected is not None
    method.roles["reward"].module.head.weight.data.fill_(0.1)  # type: ignore[union-attr, operator]
    rows = sorted(range(64), key=lambda row: held_out(batch.prompts[row]))  # what teaches, and then what does not
    parts = [[rows[k] for k in part] for part in (range(32), range(32, 64))]
    cut = [
        replace(batch, images=batch.images[p], rejected=batch.rejected[p], prompts=[batch.prompts[k] for k in p]) for p in (rows, *parts)
    ]
    whole, *halves = [float(method.loss(part, TURN, 0)[0].detach()) for part in cut]
    assert halves[1] < halves[0]
    assert whole == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_held_out_prompts_and_ties_teach_nothing(method: BradleyTerry) -> None:
    batch = WorldsConfig(pairs=True).build().batch(0, 64)
    assert batch.rejected is not None
    held = [row for row, prompt in enumerate(batch.prompts) if held_out(prompt)]
    free = [row for row in range(64) if row not in held]
    assert held
    ties = replace(batch, images=batch.images.clone(), rejected=batch.rejected.clone())
    assert ties.rejected is not None
    ties.images[free[1:]] = ties.rejected[free[1:]]  # one pair is left that may teach
    method.roles["reward"].module.head.weight.data.fill_(0.1)  # type: ignore[union-attr, operator]
    loss, metrics = method.loss(ties, TURN, 0)
    one = replace(batch, images=batch.images[free[:1]], rejected=batch.rejected[free[:1]], prompts=[batch.prompts[free[0]]], ids=["one"])
    assert 64 * float(loss.detach()) == pytest.approx(float(method.loss(one, TURN, 0)[0].detach()), rel=1e-5)
    assert float(metrics["ties"].sum()) == len(free) - 1
    assert torch.nonzero(metrics["held_out"]).flatten().tolist() == held
    assert (metrics["held_out_right"] <= metrics["held_out"]).all()
    all_ties = replace(batch, rejected=batch.images)
    nothing, metrics = method.loss(all_ties, TURN, 0)
    assert not metrics["held_out"].any()
    nothing.backward()
    assert float(nothing.detach()) == 0


def test_it_needs_pairs(method: BradleyTerry) -> None:
    with pytest.raises(UserError, match="preference pairs"):
        method.loss(WorldsConfig().build().batch(0, 2), TURN, 0)


def test_a_run_teaches_the_preferred_look_and_exports_the_model(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_config(TINY, pairs=True, steps=40, batch=32, checkpoint=40, preview=40, evaluate=40)
    config.optim = replace(config.optim, lr=1e-2)
    trainer = Trainer(config, tmp_path)
    before = {name: x.clone() for name, x in trainer.pipeline.state_dict().items()}
    trainer.run()
    losses = [line["reward.loss"] for line in read(tmp_path / "metrics.jsonl") if "reward.loss" in line]
    assert losses[0] == pytest.approx(math.log(2), rel=0.15), "all but that more or fewer than one pair in eight is held out"
    assert sum(losses[-5:]) / 5 < 0.35, losses
    reward = LearnedConfig(str(tmp_path)).build()
    batch = WorldsConfig(pairs=True, seed=9).build().batch(0, 64)
    assert batch.rejected is not None
    assert float((reward(batch.images, batch.prompts) > reward(batch.rejected, batch.prompts)).float().mean()) > 0.8
    assert all(torch.equal(before[name], x) for name, x in trainer.pipeline.state_dict().items()), "the student stays as it is"
    assert json.loads((tmp_path / "export" / "reward" / "reward.json").read_text())["kind"] == "reward_model"
