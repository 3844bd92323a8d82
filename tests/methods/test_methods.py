"""What every method's loss must be where theory says what it is, and golden curves for all of them."""

import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bright import BRIGHT
from lettered import LetteredConfig

from mezzotint.data.batch import Batch, Loader
from mezzotint.data.pairs import PairsConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.flow.time import grid
from mezzotint.methods.add import ADDConfig
from mezzotint.methods.consistency import ConsistencyConfig
from mezzotint.methods.consistency_training import ConsistencyTrainingConfig
from mezzotint.methods.denoise import DenoiseConfig, flow_error, roughness
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig, dpo_loss
from mezzotint.methods.dreambooth import DreamBoothConfig
from mezzotint.methods.enhance import EnhanceConfig
from mezzotint.methods.flow_grpo import FlowGRPOConfig
from mezzotint.methods.guidance_distill import GuidanceDistillConfig
from mezzotint.methods.ladd import LADDConfig
from mezzotint.methods.lcm import LCMConfig
from mezzotint.methods.meanflow import MeanFlowConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.methods.progressive import ProgressiveConfig
from mezzotint.methods.refl import ReFLConfig
from mezzotint.methods.reflow import ReflowConfig
from mezzotint.methods.repa import OwnConfig
from mezzotint.methods.reward import BradleyTerryConfig
from mezzotint.methods.scm import SCMConfig
from mezzotint.pipeline import Pipeline, PipelineConfig, Sampling
from mezzotint.rewards import RewardModelConfig
from mezzotint.rewards.model import SmallEncoderConfig
from mezzotint.text import ByteEncoderConfig
from mezzotint.text.writer import ByteWriterConfig
from mezzotint.train.log import read
from mezzotint.train.trainer import RunConfig, Trainer

WORLDS, PAIRS = WorldsConfig(), WorldsConfig(pairs=True)
WRITER = ByteWriterConfig(width=32, depth=1, heads=2, length=272)
METHODS: dict[str, tuple[MethodConfig, WorldsConfig]] = {
    "denoise": (DenoiseConfig(), WORLDS),
    "dpo": (DPOConfig(), PAIRS),
    "consistency": (ConsistencyConfig(), WORLDS),
    "dmd": (DMDConfig(), WORLDS),
    "guidance_distill": (GuidanceDistillConfig(), WORLDS),
    "progressive": (ProgressiveConfig(first=8, last=2, stage=7), WORLDS),
    "reflow": (ReflowConfig(perceptual=0.1), WORLDS),
    "meanflow": (MeanFlowConfig(difference=0.02), WORLDS),
    "ladd": (LADDConfig(), WORLDS),
    "add": (ADDConfig(OwnConfig(), levels=2), WORLDS),
    "scm": (SCMConfig(warmup=10, difference=0.02), WORLDS),
    "lcm": (LCMConfig(grid=50, skip=2), WORLDS),
    "consistency_training": (ConsistencyTrainingConfig(stage=3), WORLDS),
    "reward": (BradleyTerryConfig(RewardModelConfig(SmallEncoderConfig((8, 16), ByteEncoderConfig(width=16, heads=2)))), PAIRS),
    "flow_grpo": (FlowGRPOConfig(goal=BRIGHT, group=2, steps=3, kl=100.0), WORLDS),
    "refl": (ReFLConfig(BRIGHT, steps=3, last=2), WORLDS),
    "dreambooth": (DreamBoothConfig(class_prompt="a ring", pictures=4), WORLDS),
    "enhance": (EnhanceConfig(WRITER), WORLDS),
    "enhance_grpo": (LetteredConfig(writer=WRITER.replace(length=112), group=2), WorldsConfig(long_every=1_000_000)),
}
LOSSES = {"reward": "reward.loss", "enhance": "writer.loss", "enhance_grpo": "writer.loss"}  # the others train their student
GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def pairs() -> Batch:
    return WorldsConfig(pairs=True).build().batch(0, 8)


def test_the_first_loss_of_a_zero_network_is_noise_plus_data(tiny: PipelineConfig) -> None:
    # E ||eps - x0||^2 = 1 + E x0^2 for a network that predicts a velocity of zero.
    pipeline = replace(tiny, denoiser=replace(tiny.denoiser, prediction="velocity")).build()
    batch = WorldsConfig().build().batch(0, 64)
    torch.manual_seed(0)
    loss, metrics = DenoiseConfig().build(pipeline).loss(batch, ("student",), 0)
    assert float(loss.detach()) == pytest.approx(1 + float(batch.images.square().mean()), rel=0.02)
    assert metrics["t"].shape == metrics["loss"].shape == (64,)


def test_the_flow_error_of_the_exact_velocity_is_zero(pipeline: Pipeline) -> None:
    x0, eps, t = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.7])
    pipeline.velocity = lambda x, t, cond: eps - x0  # type: ignore[method-assign, assignment]
    assert torch.equal(flow_error(pipeline, x0, eps, t, pipeline.encode(["", ""])), torch.zeros(2))


def test_roughness_is_the_mean_square_of_differences() -> None:
    board = torch.ones(1, 3, 4, 4)
    board[:, :, ::2, 1::2] = board[:, :, 1::2, ::2] = -1
    assert roughness(torch.full((1, 3, 4, 4), 5.0)).item() == 0
    assert roughness(board).item() == 8  # every neighbour differs by 2, in both directions


def test_detail_changes_the_loss_and_not_its_minimum(pipeline: Pipeline) -> None:
    batch = WorldsConfig().build().batch(0, 4)
    plain, detailed = DenoiseConfig().build(pipeline), DenoiseConfig(detail=2.0).build(pipeline)

    def both() -> list[tuple[float, float]]:
        out = []
        for method in (plain, detailed):
            torch.manual_seed(0)
            loss, metrics = method.loss(batch, ("student",), 0)
            out.append((float(loss.detach()), float(metrics["loss"].mean())))
        return out

    (loss, error), (more, same) = both()
    assert more > loss  # the term is there,
    assert same == error  # and what is reported stays the flow error
    pipeline.velocity = lambda x, t, cond: (x - batch.images) / t[:, None, None, None]  # type: ignore[method-assign, assignment]
    assert all(value < 1e-6 for pair in both() for value in pair)


def test_captions_are_dropped_at_the_stated_rate(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    velocity = pipeline.velocity

    def watch(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        seen.append(cond.mask.any(1))  # type: ignore[attr-defined]
        return velocity(x, t, cond)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "velocity", watch)
    batch = WorldsConfig().build().batch(0, 200)
    torch.manual_seed(0)
    DenoiseConfig(drop=0.3).build(pipeline).loss(batch, ("student",), 0)
    assert float((~seen[0]).float().mean()) == pytest.approx(0.3, abs=0.1)


def test_dpo_starts_at_ln_2(pipeline: Pipeline, pairs: Batch) -> None:
    method = DPOConfig().build(pipeline)
    loss, metrics = method.loss(pairs, ("student",), 0)
    assert float(loss.detach()) == float(torch.tensor(2.0).log())
    assert torch.equal(metrics["preference"], torch.full((8,), math.log(2)))
    anchored, metrics = DPOConfig(anchor=1.0).build(pipeline).loss(pairs, ("student",), 0)
    assert float(anchored.detach()) == pytest.approx(math.log(2) + float(metrics["winner"].mean()), rel=1e-6)


def test_dpo_prefers_the_winner() -> None:
    one = torch.ones(1)
    assert dpo_loss(0.5 * one, one, one, one, beta=10.0) < math.log(2) < dpo_loss(one, 0.5 * one, one, one, beta=10.0)
    # beta / 2 times the advantage, through the sigmoid
    assert float(dpo_loss(0.5 * one, one, one, one, beta=10.0)) == pytest.approx(math.log(1 + math.exp(-2.5)))


def test_dpo_needs_pairs(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="preference pairs"):
        DPOConfig().build(pipeline).loss(WorldsConfig().build().batch(0, 2), ("student",), 0)


def test_worlds_pairs_differ_in_look_only(pairs: Batch) -> None:
    assert pairs.rejected is not None
    assert pairs.rejected.shape == pairs.images.shape
    assert not torch.allclose(pairs.images, pairs.rejected, atol=0.1)


def exact_flow_to(pipeline: Pipeline, x0: torch.Tensor) -> None:
    """Replace the network by the exact velocity of data that is one point."""
    pipeline.velocity = lambda x, t, cond: (x - x0) / t[:, None, None, None].clamp_min(1e-6)  # type: ignore[method-assign, assignment]


def test_an_exact_flow_is_consistent(pipeline: Pipeline) -> None:
    method = ConsistencyConfig().build(pipeline)
    for role in method.roles.values():
        exact_flow_to(role.module, torch.zeros(3, 32, 32))  # type: ignore[arg-type]
    batch = WorldsConfig().build().batch(0, 64)
    loss, _ = method.loss(replace(batch, images=torch.zeros_like(batch.images)), ("student",), 0)
    assert float(loss) < 1e-5
    exact_flow_to(method.student, torch.ones(3, 32, 32))
    wrong, _ = method.loss(replace(batch, images=torch.zeros_like(batch.images)), ("student",), 0)
    assert float(wrong) > 0.1


def test_the_consistency_target_follows_the_student(pipeline: Pipeline) -> None:
    method = ConsistencyConfig(decay=0.75).build(pipeline)
    target = method.roles["target"].module
    before = target.denoiser.head.weight.clone()  # type: ignore[union-attr]
    with torch.no_grad():
        method.student.denoiser.head.weight += 1.0
    method.after_step(0)
    assert torch.allclose(target.denoiser.head.weight - before, torch.tensor(0.25), atol=1e-5)  # type: ignore[union-attr]


def test_segments_end_where_the_student_steps(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    method, ends = ConsistencyConfig(segments=4, grid=16, shift=3.0).build(pipeline), set()

    def to_end(role: Pipeline, prompts: list[str], x: torch.Tensor, t: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        ends.update(end.tolist())
        return x

    monkeypatch.setattr(method, "_to_end", to_end)
    method.loss(WorldsConfig().build().batch(0, 16), ("student",), 0)
    assert sorted(ends, reverse=True) == pytest.approx(grid(4, 3.0).tolist()[1:])


def test_segments_must_divide_the_grid(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="multiple of segments"):
        ConsistencyConfig(grid=10, segments=4).build(pipeline)


def test_dmd_stands_still_where_critic_and_teacher_agree(pipeline: Pipeline) -> None:
    method = DMDConfig(guidance=1.0).build(pipeline)
    batch = WorldsConfig().build().batch(0, 4)
    loss, metrics = method.loss(batch, ("student",), 0)
    assert float(loss.detach()) < 1e-10
    assert float(metrics["direction"].max()) < 1e-5


def test_dmd_moves_the_student_towards_the_teacher(pipeline: Pipeline) -> None:
    # Teacher: all data at +0.5. Critic: all of the student's at -0.5. The loss must pull samples up.
    method = DMDConfig(guidance=1.0).build(pipeline)
    exact_flow_to(method.roles["teacher"].module, torch.full((3, 32, 32), 0.5))  # type: ignore[arg-type]
    exact_flow_to(method.roles["critic"].module, torch.full((3, 32, 32), -0.5))  # type: ignore[arg-type]
    x = torch.zeros(2, 3, 32, 32)
    direction = method._direction(x, torch.full((2,), 0.5), ["", ""])
    assert torch.allclose(direction, torch.full_like(x, -2.0), atol=1e-3), "x - direction is nearer to the teacher's data"


def test_dmd_draws_at_all_of_its_times(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    method = DMDConfig(steps=4).build(pipeline)
    ends = set()
    velocity = pipeline.velocity

    def watch(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            ends.add(round(float(t[0]), 3))
        return velocity(x, t, cond)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "velocity", watch)
    batch = WorldsConfig().build().batch(0, 2)
    for seed in range(20):
        random.seed(seed)
        method._draw(batch)
    assert ends == {round(float(t), 3) for t in grid(4)[:-1]}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str, run_config: Callable[..., RunConfig], pipeline: Pipeline, tmp_path: Path) -> None:
    """Twenty steps as in the golden file: a tolerance against other machines, since sums may be in another order there."""
    method, data = METHODS[name]
    config = run_config(method, steps=20, checkpoint=20, preview=20, evaluate=20)
    config.data = data
    pipeline.save(tmp_path / "init")
    config.init = str(tmp_path / "init")
    if name == "reflow":
        drawn = Sampling(solver="euler", steps=3)
        config.data = PairsConfig(folder=str(tmp_path / "pairs"), teacher=config.init, number=12, sampling=drawn)
    Trainer(config, tmp_path / "run").run()
    key = LOSSES.get(name, "loss")
    losses = [line[key] for line in read(tmp_path / "run" / "metrics.jsonl") if key in line]
    assert len(losses) == 20
    if folder := os.environ.get("MEZZOTINT_WRITE_GOLDEN"):
        (Path(folder) / f"{name}.json").write_text(json.dumps(losses))
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert losses == pytest.approx(golden, rel=2e-3, abs=1e-5)


def test_streams_share_nothing() -> None:
    source = WorldsConfig().build()
    first, second = Loader(source, 4, stream=0, streams=2), Loader(source, 4, stream=1, streams=2)
    ids = [set(next(loader).ids) for loader in (first, second, first, second)]
    assert len(set.union(*ids)) == 16
