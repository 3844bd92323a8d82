"""ReFL, online DPO and DreamBooth where theory says what they do; and every technique with a reward or a subject, everywhere."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bright import BRIGHT, BrightConfig
from prepared import PreparedConfig
from safetensors.torch import load_file

from mezzotint.codecs import IdentityConfig
from mezzotint.codecs.cached import CachedConfig
from mezzotint.codecs.kl import KLConfig
from mezzotint.data.batch import Batch, Loader
from mezzotint.data.folder import FolderConfig
from mezzotint.data.worlds import Worlds, WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.denoise import flow_error
from mezzotint.methods.dpo import DPOConfig, Drawn
from mezzotint.methods.dreambooth import DreamBoothConfig, WithPrior
from mezzotint.methods.flow_grpo import FlowGRPOConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.methods.refl import ReFL, ReFLConfig
from mezzotint.models import DenoiserConfig, DiTConfig, MMDiTConfig, UNetConfig
from mezzotint.models.lora import LoRAConfig
from mezzotint.pictures import save
from mezzotint.pipeline import DiscretePath, LinearPath, Pipeline, Sampling
from mezzotint.rewards import GoalConfig, JudgeConfig, RewardError
from mezzotint.text import ByteEncoderConfig, PublishedConfig
from mezzotint.train.evaluation import EvaluationConfig
from mezzotint.train.log import read
from mezzotint.train.optim import OptimConfig
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, TrainConfig, Trainer
from mezzotint.worlds import subject

TURN = ("student",)
REFL = ReFLConfig(BRIGHT, steps=4, last=1, margin=10.0, anchor=0.0)


@pytest.fixture
def batch() -> Batch:
    return WorldsConfig().build().batch(0, 4)


# ReFL


def linear(pipeline: Pipeline) -> torch.nn.Parameter:
    """Replace the network by v = theta x, whose flow is known. Returns theta."""
    theta = torch.nn.Parameter(torch.tensor(0.3))
    pipeline.velocity = lambda x, t, cond: theta * x  # type: ignore[method-assign, assignment]
    pipeline.entered = lambda noise, times: 0.05 * noise + 0.3  # type: ignore[method-assign]  # away from where decoding clamps
    return theta


def refl_loss(method: ReFL, batch: Batch) -> torch.Tensor:
    torch.manual_seed(5)
    return method.loss(batch, TURN, 0)[0]


def test_the_gradient_through_all_steps_is_the_finite_difference(pipeline: Pipeline, batch: Batch) -> None:
    theta = linear(pipeline)
    method = REFL.replace(through=4).build(pipeline)
    (exact,) = torch.autograd.grad(refl_loss(method, batch), theta)
    values = []
    for shift in (-1e-2, 1e-2):
        theta.data.fill_(0.3 + shift)
        values.append(float(refl_loss(method, batch).detach()))
    assert float(exact) == pytest.approx((values[1] - values[0]) / 2e-2, rel=1e-2)


def test_the_gradient_through_one_step_leaves_the_others_out(pipeline: Pipeline, batch: Batch) -> None:
    # x after k steps is (1 - theta / 4)^k noise; only the last of the four factors is seen.
    theta = linear(pipeline)
    method = REFL.build(pipeline)
    loss = refl_loss(method, batch)
    (exact,) = torch.autograd.grad(loss, theta)
    bright = 10 - float(loss.detach())
    assert float(exact) == pytest.approx(bright / (1 - 0.3 / 4) / 4, rel=1e-3)


def test_refl_rates_one_of_the_last_steps(pipeline: Pipeline, batch: Batch) -> None:
    method, seen = REFL.replace(steps=8, last=3).build(pipeline), set()
    for seed in range(20):
        torch.manual_seed(seed)
        seen.add(round(float(method.loss(batch, TURN, 0)[1]["t"][0]), 3))
    assert seen == {0.125, 0.25, 0.375}


def test_a_reward_above_the_margin_is_not_pushed_and_the_anchor_is_the_flow_loss(pipeline: Pipeline, batch: Batch) -> None:
    loss = refl_loss(REFL.replace(margin=-10.0).build(pipeline), batch)
    assert float(loss.detach()) == 0
    method = REFL.replace(margin=-10.0, anchor=2.0).build(pipeline)
    torch.manual_seed(5)
    anchored, metrics = method.loss(batch, TURN, 0)
    assert float(anchored.detach()) == pytest.approx(2 * float(metrics["anchor"]))
    torch.manual_seed(6)
    t, eps = method.config.times.sample(4), torch.randn_like(batch.images)
    torch.manual_seed(6)
    assert float(method._anchor(batch).detach()) == pytest.approx(
        float(flow_error(pipeline, batch.images, eps, t, pipeline.encode(batch.prompts)).mean().detach()), rel=1e-6
    )


def test_refl_needs_a_gradient_and_goes_on_without_failures(pipeline: Pipeline, batch: Batch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'judge' has none; take a learned one"):
        REFL.replace(goal=GoalConfig(JudgeConfig())).build(pipeline).loss(batch, TURN, 0)
    goal = GoalConfig(BrightConfig(batch.prompts[0]), BrightConfig(), on_failure="skip", failures=str(tmp_path))
    loss, metrics = REFL.replace(goal=goal).build(pipeline).loss(batch, TURN, 0)
    assert metrics["failed"].tolist() == [1.0, 0.0, 1.0, 0.0]
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in pipeline.parameters())
    with pytest.raises(RewardError, match="failed on all 4 pictures of step 0"):
        REFL.replace(goal=goal.replace(reward=BrightConfig(" "))).build(pipeline).loss(batch, TURN, 0)
    with pytest.raises(ValueError, match="last must be within"):
        REFL.replace(last=5).build(pipeline)


# Online DPO


def test_online_pairs_are_the_best_and_the_worst_of_a_prompt(pipeline: Pipeline) -> None:
    method = DPOConfig(draws=4, steps=2, goal=BRIGHT).build(pipeline)
    (pairs,) = method.experience(Loader(WorldsConfig().build(), 3), 0)
    assert isinstance(pairs, Drawn)
    assert pairs.rejected is not None
    bright = [images.flatten(1).mean(1) for images in (pairs.images, pairs.rejected)]
    assert torch.equal(bright[0], pairs.reward.max(1).values)
    assert torch.equal(bright[1], pairs.reward.min(1).values)
    loss, metrics = method.loss(pairs, TURN, 0)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert {"accuracy", "winner", "loser", "reward", "held_out_reward", "ties", "diversity"} <= metrics.keys()
    with pytest.raises(ValueError, match="draws must be 0 or at least 2"):
        DPOConfig(draws=1).build(pipeline)


def test_ties_teach_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    method = DPOConfig(anchor=1.0, draws=2, steps=2, goal=GoalConfig(JudgeConfig(), BrightConfig())).build(pipeline)
    (pairs,) = method.experience(Loader(WorldsConfig().build(), 3), 0)  # no picture of a random network shows what was asked
    pipeline.requires_grad_(True)
    loss, metrics = method.loss(pairs, TURN, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert metrics["ties"].tolist() == [1.0] * 3
    assert float(loss.detach()) == 0
    assert not any(p.grad is not None and p.grad.any() for p in pipeline.parameters())
    goal = GoalConfig(BrightConfig(pairs.prompts[0]), BrightConfig(), on_failure="skip", failures=str(tmp_path))
    (pairs,) = DPOConfig(draws=2, steps=2, goal=goal).build(pipeline).experience(Loader(WorldsConfig().build(), 3), 0)
    assert torch.equal(pairs.images[0], pairs.rejected[0])  # type: ignore[index]
    assert not torch.equal(pairs.images[1], pairs.rejected[1])  # type: ignore[index]


# DreamBooth


def gradients(pipeline: Pipeline, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in pipeline.parameters() if p.requires_grad], allow_unused=True))


def test_the_prior_term_is_the_plain_loss_on_class_pictures(pipeline: Pipeline) -> None:
    source = WorldsConfig(split="subject").build()
    torch.manual_seed(0)
    losses, batches = [], []
    for prior in (0.0, 0.5):
        method = DreamBoothConfig(class_prompt=subject.CLASS, prior=prior, pictures=4).build(pipeline)
        (batch,) = method.experience(Loader(source, 4), 0)
        torch.manual_seed(1)
        losses.append(method.loss(batch, TURN, 0)[0])
        batches.append(batch)
    assert not isinstance(batches[0], WithPrior)
    assert isinstance(batches[1], WithPrior)
    torch.manual_seed(1)
    alone = [method._error(images, prompts)[0].mean() for images, prompts in _halves(batches[1])]
    assert float(losses[0].detach()) == pytest.approx(float(alone[0].detach()), rel=1e-6)
    assert float(losses[1].detach()) == pytest.approx(float((alone[0] + 0.5 * alone[1]).detach()), rel=1e-6)
    without, of_subject = gradients(pipeline, losses[0]), gradients(pipeline, alone[0])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(without, of_subject, strict=True))


def _halves(batch: WithPrior) -> list[tuple[torch.Tensor, list[str]]]:
    return [(batch.images, batch.prompts), (batch.prior, [subject.CLASS] * len(batch))]


def test_class_pictures_are_the_originals_whatever_the_student_became(pipeline: Pipeline) -> None:
    expected = pipeline(subject.CLASS, 4)
    method = DreamBoothConfig(class_prompt=subject.CLASS, pictures=4).build(pipeline)
    with torch.no_grad():
        for parameter in pipeline.parameters():
            parameter += 0.1
    (batch,) = method.experience(Loader(WorldsConfig(split="subject").build(), 32), 0)
    assert isinstance(batch, WithPrior)
    assert all(any(torch.equal(picture, known) for known in expected) for picture in batch.prior)
    assert len({picture.sum().item() for picture in batch.prior}) == 4


def test_a_subject_folder_with_a_broken_picture(pipeline: Pipeline, run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    pictures = WorldsConfig(split="subject").build().batch(0, 4).images
    for number, picture in enumerate(pictures):
        save(picture, tmp_path / "subject" / f"{number}.png")
        (tmp_path / "subject" / f"{number}.txt").write_text(subject.CAPTION)
    whole = (tmp_path / "subject" / "3.png").read_bytes()
    (tmp_path / "subject" / "3.png").write_bytes(whole[: len(whole) // 2])
    config = run_config(DreamBoothConfig(class_prompt=subject.CLASS, pictures=2), steps=2)
    config.data = FolderConfig(path=str(tmp_path / "subject"), size=32, held_out=0.3, max_bad=0.3)
    config.evaluation = EvaluationConfig("subject", every=1, pictures=2, best="")
    source = config.data.build()
    assert len(source.bad) == 1
    Trainer(config, tmp_path / "run", source).run()
    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert all(math.isfinite(line["subject"]) for line in lines if "subject" in line)
    found = [line["evaluation"] for line in lines if "evaluation" in line]
    assert [set(each) >= {"fidelity", "likeness", "drift", "others"} for each in found] == [True, True]
    with pytest.raises(ValueError, match="pictures must be at least 2 for the suite subject"):
        EvaluationConfig("subject", pictures=1)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(name in page for name in ("fidelity", "drift", "others")), "what is gained beside what is forgotten"


def test_textual_inversion_moves_one_word(run_config: Callable[..., RunConfig], pipeline: Pipeline, tmp_path: Path) -> None:
    config = run_config(DreamBoothConfig(prior=0.0, word=subject.WORD), steps=3)
    pipeline.save(tmp_path / "init")
    config.data, config.init = WorldsConfig(split="subject"), str(tmp_path / "init")
    trainer = Trainer(config, tmp_path / "run")
    before = {name: x.clone() for name, x in trainer.method.student.state_dict().items()}
    trainer.run()
    moved = {name for name, x in trainer.method.student.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"text.embed.weight"}
    rows = (trainer.method.student.text.embed.weight != before["text.embed.weight"]).any(1)  # type: ignore[union-attr]
    letters = trainer.method.student.text.tokens([subject.WORD]).unique()[1:]  # type: ignore[operator]
    assert torch.equal(torch.nonzero(rows).flatten(), letters)
    captions = WorldsConfig().build().batch(0, 500).prompts
    others = trainer.method.student.text.tokens(captions).unique()  # type: ignore[operator]
    assert not set(letters.tolist()) & set(others.tolist()), "the word shares no letter's place with captions"
    with pytest.raises(UserError, match="textual inversion needs a text encoder that is trained here"):
        config.method.build(replace(config.pipeline, text=PublishedConfig()).build())


# Every technique on three architectures, with all weights and with adapters, on pixels and on latents

CODEC = KLConfig(widths=(4, 4), groups=2, layers=1, attention=False, channels=3, quant=False, scale=1.0)
NETWORKS: dict[str, DenoiserConfig] = {
    "dit": DiTConfig(width=32, depth=2, heads=2, patch=8, text_width=32),
    "mmdit": MMDiTConfig(width=32, depth=2, heads=2, patch=4, channels=3, text_width=32, pooled_width=32, table=8, base=8),
    "unet": UNetConfig(widths=(8, 16), depths=(0, 1), heads=(1, 2), groups=4, channels=3, text_width=32, layers=1),
}
SETTINGS = [("dit", "pixels", "adapter"), ("dit", "latents", "all"), ("mmdit", "pixels", "all"), ("mmdit", "latents", "adapter")]
SETTINGS += [("unet", "pixels", "adapter"), ("unet", "latents", "all")]
TECHNIQUES: dict[str, tuple[MethodConfig, WorldsConfig]] = {
    "flow_grpo": (FlowGRPOConfig(goal=BRIGHT, group=2, steps=3, window=1, updates=1), WorldsConfig(size=16)),
    "refl": (ReFLConfig(BRIGHT, steps=3, last=2), WorldsConfig(size=16)),
    "dpo": (DPOConfig(draws=2, steps=2, goal=BRIGHT, anchor=1.0), WorldsConfig(size=16)),
    "dreambooth": (DreamBoothConfig(class_prompt=subject.CLASS, pictures=2), WorldsConfig(size=16, split="subject")),
}


class Stopping(Worlds):
    """Worlds whose second batch stops the run, once."""

    stops = True

    def batch(self, number: int, size: int) -> Batch:
        if number == 1 and self.stops:
            self.stops = False
            raise Stopped("enough for now")
        return super().batch(number, size)


@pytest.mark.parametrize("setting", SETTINGS, ids="-".join)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_trains_and_resumes_everywhere(name: str, setting: tuple[str, str, str], tmp_path: Path) -> None:
    network, space, weights = setting
    pipeline = PreparedConfig(
        ByteEncoderConfig(width=32, depth=1, heads=2),
        NETWORKS[network],
        CODEC if space == "latents" else IdentityConfig(),
        Sampling(size=16, steps=2),
        DiscretePath() if network == "unet" else LinearPath(),
    )
    train = TrainConfig(steps=2, batch=2, log=1, preview=9, evaluate=9, checkpoint=1, held_out=2)
    method, data = TECHNIQUES[name]
    adapter = LoRAConfig(rank=2 if weights == "adapter" else 0)
    run = RunConfig(pipeline, data, method, OptimConfig(lr=1e-3, warmup=1), train, adapter=adapter)
    whole = Trainer(run, tmp_path / "whole")
    before = {name: p.clone() for name, p in whole.method.student.named_parameters()}
    whole.run()
    moved = {name for name, p in whole.method.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved) is (weights == "adapter")
    if space == "pixels":  # those on latents also stop and go on, with an adapter and without
        return
    source = Stopping(data)
    with pytest.raises(Stopped):
        Trainer(run, tmp_path / "parts", source).run()
    Trainer(run, tmp_path / "parts", source).run()
    exports = [load_file(tmp_path / folder / "export" / "model.safetensors") for folder in ("whole", "parts")]
    assert exports[0].keys() == exports[1].keys()
    assert [key for key, tensor in exports[0].items() if not torch.equal(tensor, exports[1][key])] == []


class Beforehand(Worlds):
    """Worlds whose pictures are latents (B, 4, 8, 8) already."""

    def batch(self, number: int, size: int) -> Batch:
        batch = super().batch(number, size)
        return replace(batch, images=torch.randn(len(batch), 4, 8, 8, generator=torch.Generator().manual_seed(number)))

    def held_out(self, size: int) -> Batch:
        return self.batch(0, size)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_what_it_draws_is_encoded_where_latents_were_made_beforehand(name: str, tmp_path: Path) -> None:
    network = DiTConfig(width=32, depth=1, heads=2, patch=4, channels=4, text_width=32)
    text, codec = ByteEncoderConfig(width=32, depth=1, heads=2), CachedConfig(codec=CODEC.replace(channels=4))
    pipeline = PreparedConfig(text, network, codec, Sampling(size=16, steps=2))
    method, data = TECHNIQUES[name]
    train = TrainConfig(steps=1, batch=2, log=1, preview=9, evaluate=9, held_out=2)
    Trainer(RunConfig(pipeline, data, method, OptimConfig(lr=1e-3, warmup=1), train), tmp_path, Beforehand(data)).run()
    (line,) = [line for line in read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert math.isfinite(line["loss"])
