"""Flow-GRPO: first-step identities, closed forms, its variants, and that a reward rises."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bright import BRIGHT, BrightConfig
from torch import Tensor

from mezzotint.data.batch import Loader
from mezzotint.data.worlds import WorldsConfig
from mezzotint.flow.solvers import constant, euler, grpo, kl, log_prob, transition
from mezzotint.methods.flow_grpo import FlowGRPO, FlowGRPOConfig, Transition, within_window
from mezzotint.methods.policy import advantages, policy_loss
from mezzotint.pipeline import Pipeline
from mezzotint.rewards import GoalConfig
from mezzotint.train.log import read
from mezzotint.train.trainer import RunConfig, Trainer

TURN = ("student",)


TINY = FlowGRPOConfig(goal=BRIGHT, group=4, steps=4)


def rollout(method: FlowGRPO, step: int = 0, size: int = 2, position: int = 0, rank: int = 0, world: int = 1) -> list[Transition]:
    torch.manual_seed(step)
    loader = Loader(WorldsConfig().build(), size, rank, world)
    loader.position = position
    batches = method.experience(loader, step)
    assert all(isinstance(batch, Transition) for batch in batches)
    return batches  # type: ignore[return-value]


def test_the_density_of_a_step_is_the_normal_one() -> None:
    torch.manual_seed(0)
    x, v = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t, s = torch.tensor([1.0, 0.7, 0.4]), torch.tensor([0.9, 0.6, 0.3])
    mean, std = transition(x, v, t, s, grpo(0.7))
    after = mean + torch.randn_like(mean) * std[:, None, None, None]
    g = 0.7 * (t / (1 - torch.tensor([0.9, 0.7, 0.4]))).sqrt()
    dt = s - t
    by_hand = x * (1 + g**2 * dt / (2 * t))[:, None, None, None] + v * ((1 + g**2 * (1 - t) / (2 * t)) * dt)[:, None, None, None]
    assert torch.allclose(mean, by_hand, atol=1e-6)
    assert torch.allclose(std, g * (-dt).sqrt(), atol=1e-6)
    exact = torch.distributions.Normal(mean, std[:, None, None, None]).log_prob(after).flatten(1).mean(1)
    assert torch.allclose(log_prob(after, mean, std), exact, atol=1e-5)
    other = torch.randn_like(v)
    mean_ref, _ = transition(x, other, t, s, grpo(0.7))
    closed = (-dt / 2) * (1 / g + g * (1 - t) / (2 * t)) ** 2 * (v - other).square().flatten(1).mean(1)
    assert torch.allclose(kl(mean, mean_ref, std), closed, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_on_policy_the_ratio_is_exactly_one_and_the_kl_exactly_zero(pipeline: Pipeline, guidance: float) -> None:
    pipeline.config.sampling.guidance = guidance
    method = TINY.build(pipeline)
    batches = rollout(method)
    assert len(batches) == 3  # all steps but the last
    for batch in batches:
        loss, metrics = method.loss(batch, TURN, 0)
        assert torch.equal(metrics["ratio"], torch.ones(8))
        assert torch.equal(metrics["kl"], torch.zeros(8))
        assert float(loss.detach()) == pytest.approx(-float(batch.advantage.mean()), abs=1e-6)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    _, metrics = method.loss(batches[0], TURN, 0)
    assert (metrics["ratio"] != 1).all()
    assert (metrics["kl"] > 0).all()


def test_advantages_are_of_groups_by_prompt() -> None:
    rewards = torch.tensor([1.0, 5.0, 0.0, 5.0, math.nan, 2.0])
    got = advantages(rewards, ["a", "b", "a", "b", "a", "c"])
    assert torch.allclose(got, torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 0.0]), atol=1e-3)
    assert float(advantages(torch.tensor([1.0] + [0.0] * 99), ["a"] * 100)[0]) == 5.0


def test_the_clipped_loss_and_its_gradient() -> None:
    ratio = torch.tensor([1.0, 1.3, 1.3, 0.7, 0.7], requires_grad=True)
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    divergence = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0])
    loss = policy_loss(ratio, advantage, divergence, TINY.replace(clip=0.2, kl=0.25))
    assert loss.tolist() == pytest.approx([-2.0, -1.2, 1.3, -0.7, 0.8 + 0.5])
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    # Beyond the range, what would push further out is cut, and what pulls back is not.
    assert gradient.tolist()[1:] == [0.0, 1.0, -1.0, 0.0]


def test_without_noise_a_roll_out_is_eulers(pipeline: Pipeline) -> None:
    method = TINY.replace(law="constant", level=0.0).build(pipeline)
    noise, prompts = torch.randn(2, 3, 32, 32), ["a red star", "a ring"]
    walk = method._walk(noise, prompts, 0)
    denoise = pipeline.guided(pipeline.encode(prompts), pipeline.config.sampling.guidance)
    *_, last = euler(denoise, noise, pipeline.times(pipeline.config.sampling.replace(steps=4)))
    assert torch.allclose(walk[-1].x, last.x, atol=1e-5)


def test_a_window_is_stochastic_and_the_rest_is_eulers() -> None:
    t, s = torch.tensor([1.0, 0.75, 0.5, 0.25]), torch.tensor([0.75, 0.5, 0.25, 0.0])
    a, b, std = within_window(constant(0.5), 0.75, 0.25)(t, s)
    inside = constant(0.5)(t, s)
    assert (std > 0).tolist() == [False, True, True, False]
    assert torch.equal(a[[0, 3]], torch.ones(2))
    assert torch.equal(b[[0, 3]], (s - t)[[0, 3]])
    assert all(torch.equal(part[1:3], whole[1:3]) for part, whole in zip((a, b, std), inside, strict=True))


def test_where_windows_lie(pipeline: Pipeline) -> None:
    times = pipeline.times(pipeline.config.sampling.replace(steps=8)).tolist()

    def first(config: FlowGRPOConfig, step: int) -> int:
        batches = rollout(config.build(pipeline), step, size=1)
        assert len(batches) == 2
        return times.index(float(batches[0].t[0]))

    tiny = TINY.replace(group=2, steps=8, window=2)
    assert {first(tiny, step) for step in range(12)} == {0, 1, 2}, "Fast: anywhere within the first half"
    assert [first(tiny.replace(slide=2), step) for step in (0, 1, 2, 10, 11, 12)] == [0, 0, 1, 5, 5, 0], "MixGRPO: on and on"


def test_a_group_may_start_from_one_noise(pipeline: Pipeline) -> None:
    (batch, *_) = rollout(TINY.replace(shared=True).build(pipeline))
    assert torch.equal(batch.images[0], batch.images[3])
    assert not torch.equal(batch.images[0], batch.images[4])
    assert not torch.equal(batch.after[0], batch.after[3])
    (batch, *_) = rollout(TINY.build(pipeline))
    assert not torch.equal(batch.images[0], batch.images[3])


def test_rows_in_parts_are_the_same_roll_out(pipeline: Pipeline) -> None:
    whole = rollout(TINY.replace(law="constant", level=0.0, window=1).build(pipeline))
    assert not whole, "no noise, nothing to learn from"
    parts = rollout(TINY.replace(rows=4).build(pipeline))
    assert [len(batch) for batch in parts] == [4] * 6
    assert torch.allclose(torch.cat([parts[0].images, parts[3].images]), rollout(TINY.build(pipeline))[0].images)


def test_pictures_whose_reward_failed_have_no_advantage(pipeline: Pipeline, tmp_path: Path) -> None:
    prompt = WorldsConfig().build().batch(0, 2).prompts[0]
    goal = GoalConfig(BrightConfig(prompt), BrightConfig(), on_failure="skip", failures=str(tmp_path))
    method = TINY.replace(goal=goal).build(pipeline)
    (batch, *_) = rollout(method)
    _, metrics = method.loss(batch, TURN, 0)
    assert metrics["failed"].tolist() == [1.0] * 4 + [0.0] * 4
    assert batch.advantage[:4].tolist() == [0.0] * 4
    assert batch.advantage[4:].all()
    assert metrics["reward"].isfinite()
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 4


def gradient(method: FlowGRPO, places: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """The mean gradient over micro-batches, each at (position, rank, world) of a loader, seeded by its number."""
    method = copy.deepcopy(method)
    method.student.requires_grad_(True).zero_grad()
    for position, rank, world in places:
        number = position * world + rank
        batches = rollout(method, step=number, position=position, rank=rank, world=world)
        for batch in batches:
            (method.loss(batch, TURN, number)[0] / len(batches) / 2).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in method.student.parameters() if p.grad is not None]


def test_two_ranks_are_one(pipeline: Pipeline) -> None:
    # A group never leaves its micro-batch, so nothing has to be gathered: ranks only add their gradients.
    method = TINY.build(pipeline)
    one = gradient(method, [(0, 0, 1), (1, 0, 1)])
    first, second = gradient(method, [(0, 0, 2)]), gradient(method, [(0, 1, 2)])
    assert any(bool(g.any()) for g in one)
    assert all(torch.allclose(g, a + b, atol=1e-7) for g, a, b in zip(one, first, second, strict=True))


def test_a_trivial_reward_rises_and_is_logged(run_config: Callable[..., RunConfig], pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "init")
    config = run_config(TINY.replace(group=8, kl=0.0, clip=0.1), steps=10, batch=2, checkpoint=20, preview=20, evaluate=20)
    config.init, config.optim, config.data = str(tmp_path / "init"), replace(config.optim, lr=5e-3), WorldsConfig(size=16)
    Trainer(config, tmp_path / "run").run()
    lines = [line for line in read(tmp_path / "run" / "metrics.jsonl") if "reward" in line]
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.05, [line["reward"] for line in lines]
    assert lines[0]["reward"] == pytest.approx(lines[0]["held_out_reward"])
    assert {"diversity", "kl", "ratio", "ratio_off", "clipped", "telling", "failed"} <= lines[0].keys()
    assert all(line["failed"] == 0 for line in lines)
    assert ">alarm<" in (tmp_path / "run" / "report.html").read_text()


def test_settings_that_cannot_be_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="group must be at least 2"):
        TINY.replace(group=1).build(pipeline)
    with pytest.raises(ValueError, match="window must be fewer"):
        TINY.replace(window=4).build(pipeline)
