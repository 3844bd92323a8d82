"""Students and teachers: what theory says of the first losses, and every technique on three architectures."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import Gaussian
from prepared import PreparedConfig
from safetensors.torch import load_file
from torch import Tensor

from mezzotint.codecs import IdentityConfig
from mezzotint.codecs.kl import KLConfig
from mezzotint.data.batch import Batch
from mezzotint.data.worlds import Worlds, WorldsConfig
from mezzotint.errors import UserError
from mezzotint.flow.path import from_velocity
from mezzotint.flow.rate import exact_rate, quotient_rate
from mezzotint.flow.time import TimeDensity, grid
from mezzotint.methods.add import ADDConfig
from mezzotint.methods.adversarial import Heads, hinge
from mezzotint.methods.consistency import ConsistencyConfig
from mezzotint.methods.consistency_training import ConsistencyTrainingConfig
from mezzotint.methods.denoise import flow_error
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.guidance_distill import GuidanceDistillConfig, guided_by
from mezzotint.methods.ladd import LADDConfig
from mezzotint.methods.lcm import LCMConfig
from mezzotint.methods.meanflow import MeanFlowConfig
from mezzotint.methods.method import Method, MethodConfig, Turn
from mezzotint.methods.progressive import ProgressiveConfig, average_velocity
from mezzotint.methods.reflow import ReflowConfig
from mezzotint.methods.repa import OwnConfig
from mezzotint.methods.scm import SCMConfig, tangent, trigonometric
from mezzotint.methods.teacher import block_features, teacher_of, told_copy
from mezzotint.models import Cond, DenoiserConfig, DiTConfig, FluxConfig, MMDiTConfig, PixArtConfig, UNetConfig
from mezzotint.models.denoiser import tell
from mezzotint.models.embed import TimeEmbedding
from mezzotint.models.lora import LoRAConfig
from mezzotint.pipeline import DiscretePath, LinearPath, Pipeline, PipelineConfig, Sampling, load
from mezzotint.text import ByteEncoderConfig
from mezzotint.train.optim import OptimConfig
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, TrainConfig, Trainer

STUDENT = ("student",)


def loss_of(method: Method, batch: Batch, step: int = 0, turn: Turn = STUDENT) -> float:
    return float(method.loss(batch, turn, step)[0].detach())


@pytest.fixture
def batch() -> Batch:
    return WorldsConfig().build().batch(0, 8)


def straight_to(pipeline: Pipeline, x0: Tensor) -> None:
    """Replace the network by the exact velocity of data that is one point: all its paths are straight."""
    pipeline.velocity = lambda x, t, cond: (x - x0) / t[:, None, None, None].clamp_min(1e-6)  # type: ignore[method-assign, assignment]


# Guidance distillation


def test_a_student_that_is_the_guided_teacher_has_no_loss(pipeline: Pipeline, batch: Batch) -> None:
    method = GuidanceDistillConfig(largest=4.0).build(pipeline)

    def perfect(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.guidance is not None
        assert cond.guidance.min() >= 1
        assert cond.guidance.max() <= 4
        return guided_by(pipeline, replace(cond, guidance=None), cond.guidance, x, t)

    assert loss_of(method, batch) > 1e-4, "the untrained student does not know guidance"
    method.student.velocity = perfect  # type: ignore[method-assign, assignment]
    assert loss_of(method, batch) < 1e-10


def test_guidance_by_a_number_for_each_sample_is_the_samplers(pipeline: Pipeline) -> None:
    cond, x, t = pipeline.encode(["a red star", "a ring"]), torch.randn(2, 3, 32, 32), torch.tensor([0.4, 0.8])
    both = guided_by(pipeline, cond, torch.tensor([1.0, 3.0]), x, t)
    assert torch.allclose(both[:1], pipeline.velocity(x, t, cond)[:1], atol=1e-5)
    assert torch.allclose(both[1:], pipeline.guided(cond, 3.0)(x, t)[1:], atol=1e-5)


def test_a_network_that_is_told_a_number_is_at_first_what_it_was(pipeline: Pipeline) -> None:
    student = told_copy(pipeline, "guidance")
    assert student.config.denoiser.distilled
    assert not pipeline.config.denoiser.distilled
    x, t, cond = torch.randn(2, 3, 32, 32), torch.tensor([0.4, 0.8]), pipeline.encode(["a", "b"])
    assert torch.equal(student.velocity(x, t, replace(cond, guidance=torch.tensor([1.0, 5.0]))), pipeline.velocity(x, t, cond))
    for parameter in student.denoiser.embed_guidance.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter)
    ones, fives = (student.velocity(x, t, replace(cond, guidance=torch.full((2,), w))) for w in (1.0, 5.0))
    assert not torch.allclose(ones, fives, atol=1e-3)
    with pytest.raises(ValueError, match="told guidance already"):
        told_copy(student, "guidance")
    with pytest.raises(ValueError, match="guidance must be given to a network that is told it"):
        student.denoiser(x, t, cond)
    with pytest.raises(ValueError, match="PixArt has no input for jump; take one of DiT, MMDiT, Flux and UNet"):
        tell(PixArtConfig(width=48, depth=1, heads=2, patch=4, channels=3, text_width=32).build(), "jump")


# Progressive distillation


def ddim(data: Gaussian, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM's step as its paper has it: the clean estimate, noised again by the noise estimate."""
    v = data.velocity(x, t)
    return (1 - s)[:, None] * from_velocity(v, "data", x, t) + s[:, None] * from_velocity(v, "noise", x, t)


def test_the_target_is_two_ddim_steps_in_one() -> None:
    data = Gaussian(5)
    x = torch.randn(4, 5, dtype=torch.float64)
    times = torch.tensor([[1.0, 0.8, 0.5, 0.25], [0.9, 0.7, 0.3, 0.1], [0.8, 0.5, 0.1, 0.0]], dtype=torch.float64)
    t, middle, s = times
    ended = ddim(data, ddim(data, x, t, middle), middle, s)
    target = average_velocity(data.velocity, x, times)
    assert torch.allclose(x + (s - t)[:, None] * target, ended, atol=1e-12)
    # The data for which one DDIM step leads there (Salimans & Ho 2022, appendix G), with the target's own noise.
    ratio = (s / t)[:, None]
    x0 = (ended - ratio * x) / ((1 - s)[:, None] - ratio * (1 - t)[:, None])
    assert torch.allclose(from_velocity(target, "data", x, t), x0, atol=1e-12)


def test_a_straight_teacher_is_its_own_student(pipeline: Pipeline, batch: Batch) -> None:
    method = ProgressiveConfig(guidance=1.0).build(pipeline)
    assert loss_of(method, batch) > 1e-6, "the paths of a random network are curved"
    for role in method.roles.values():
        straight_to(role.module, torch.full((3, 32, 32), 0.3))  # type: ignore[arg-type]
    assert loss_of(method, batch) < 1e-9


def test_calls_are_halved_and_the_student_takes_the_teachers_place(pipeline: Pipeline, batch: Batch) -> None:
    config = ProgressiveConfig(first=8, last=2, stage=10)
    assert [config.calls(step) for step in (0, 9, 10, 19, 20, 1000)] == [8, 8, 4, 4, 2, 2]
    method = config.build(pipeline)
    with torch.no_grad():
        method.student.denoiser.head.weight += 1  # type: ignore[operator, union-attr]
    head = lambda name: method.roles[name].module.denoiser.head.weight  # type: ignore[union-attr]  # noqa: E731
    for step, same in ((0, False), (8, False), (9, True)):
        method.after_step(step)
        assert torch.equal(head("teacher"), head("student")) is same
    with pytest.raises(ValueError, match="first must be last times a power of two, got 12 and 4"):
        ProgressiveConfig(first=12, last=4).build(pipeline)


def test_only_the_first_teacher_is_guided_and_steps_end_where_the_student_draws(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProgressiveConfig(first=4, last=2, stage=1, guidance=3.0, shift=2.0)
    method, seen = config.build(pipeline), []
    teacher = method.roles["teacher"].module
    real = teacher.guided  # type: ignore[operator]

    def watched(cond: Cond, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        seen.append(scale)
        return real(cond, scale)  # type: ignore[no-any-return]

    monkeypatch.setattr(teacher, "guided", watched)
    for step, calls in ((0, 4), (1, 2)):
        _, metrics = method.loss(WorldsConfig().build().batch(0, 8), STUDENT, step)
        assert metrics["calls"] == calls
        assert set(metrics["t"].tolist()) == set(grid(calls, 2.0)[:-1].tolist())
    assert seen == [3.0, 1.0]


# Reflow


@pytest.fixture
def coupled(batch: Batch) -> Batch:
    torch.manual_seed(5)
    return replace(batch, latents=batch.images, noise=torch.randn_like(batch.images))


def test_reflow_has_no_loss_where_the_flow_goes_straight_from_noise_to_its_sample(pipeline: Pipeline, coupled: Batch) -> None:
    assert coupled.noise is not None
    assert coupled.latents is not None
    method = ReflowConfig(perceptual=1.0).build(pipeline)
    assert loss_of(method, coupled) > 0.1
    straight = coupled.noise - coupled.latents
    pipeline.velocity = lambda x, t, cond: straight  # type: ignore[method-assign, assignment]
    assert loss_of(method, coupled) < 1e-9
    shuffled = replace(coupled, noise=coupled.noise.flip(0))
    assert loss_of(method, shuffled) > 0.1, "noise belongs to its sample"


def test_a_share_of_the_batch_is_at_pure_noise(pipeline: Pipeline, coupled: Batch) -> None:
    many = replace(coupled, **{name: getattr(coupled, name).repeat(25, 1, 1, 1) for name in ("images", "latents", "noise")})
    many = replace(many, prompts=coupled.prompts * 25)
    pipeline.velocity = lambda x, t, cond: x  # type: ignore[method-assign, assignment]
    for ones in (0.0, 0.4, 1.0):
        _, metrics = ReflowConfig(ones=ones).build(pipeline).loss(many, STUDENT, 0)
        assert float((metrics["t"] == 1).float().mean()) == pytest.approx(ones, abs=0.12)


def test_one_step_distillation_compares_samples(pipeline: Pipeline, coupled: Batch) -> None:
    _, metrics = ReflowConfig(ones=1.0).build(pipeline).loss(coupled, STUDENT, 0)
    assert coupled.noise is not None
    velocity = pipeline.velocity(coupled.noise, torch.ones(8), pipeline.encode(coupled.prompts))
    difference = (coupled.noise - velocity) - coupled.latents  # the student's one-step samples minus the teacher's
    assert torch.allclose(metrics["loss"], difference.square().flatten(1).mean(1).detach(), rtol=1e-4)


def test_reflow_needs_pairs_of_its_own_latents(pipeline: Pipeline, batch: Batch, coupled: Batch) -> None:
    method = ReflowConfig().build(pipeline)
    with pytest.raises(UserError, match="reflow needs pairs"):
        method.loss(batch, STUDENT, 0)
    with pytest.raises(UserError, match="latents have 4 channels and the student's 3"):
        method.loss(replace(coupled, latents=torch.zeros(8, 4, 32, 32)), STUDENT, 0)


# MeanFlow


def test_at_one_time_mean_flow_is_flow_matching(pipeline: Pipeline, batch: Batch) -> None:
    method = MeanFlowConfig(distil=False, same=1.0, power=0.0).build(pipeline)
    torch.manual_seed(3)
    loss, metrics = method.loss(batch, STUDENT, 0)
    torch.manual_seed(3)
    eps = torch.randn_like(batch.images)
    plain = flow_error(pipeline, batch.images, eps, metrics["t"], pipeline.encode(batch.prompts))
    assert torch.equal(metrics["loss"], plain.detach())
    assert float(loss.detach()) == float(plain.mean().detach())


def test_the_mean_velocity_of_a_gaussian_satisfies_the_identity() -> None:
    data = Gaussian(5)
    x, t = torch.randn(4, 5, dtype=torch.float64), torch.tensor([1.0, 0.9, 0.5, 0.4], dtype=torch.float64)
    jump, v = torch.tensor([1.0, 0.2, 0.45, 0.1], dtype=torch.float64), data.velocity(x, t)
    r = t - jump

    def u(x: Tensor, t: Tensor) -> Tensor:
        return (x - data.move(x, t[:, None], r[:, None])) / (t - r)[:, None]

    identity = v - jump[:, None] * exact_rate(u, x, t, v)
    assert torch.allclose(identity, u(x, t), atol=1e-10)
    assert not torch.allclose(v, u(x, t), atol=0.05)
    roughly = v - jump[:, None] * quotient_rate(u, x, t, v, 0.01, r, 1.0)
    assert torch.allclose(roughly[1:], u(x, t)[1:], atol=5e-3)  # both sides: second order
    assert torch.allclose(roughly[:1], u(x, t)[:1], atol=5e-2)  # at t = 1 one side only: first order


@pytest.mark.parametrize("name", ["dit", "mmdit", "flux", "unet"])
def test_the_rate_goes_through_every_network(name: str) -> None:
    # Slow time embeddings, since differences of a fast one say nothing.
    config = NETWORKS.get(name, MMDIT).replace(prediction="velocity")
    pipeline = told_copy(PreparedConfig(TEXT, config).build(), "jump")
    for module in pipeline.modules():
        if isinstance(module, TimeEmbedding):
            module.scale = 1
    for parameter in pipeline.denoiser.embed_jump.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter, std=0.2)
    cond = pipeline.encode(["a red star", "two rings"])
    x, v, t, jump = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([0.5, 0.8]), torch.tensor([0.2, 0.7])

    r = t - jump

    def u(x: Tensor, t: Tensor) -> Tensor:
        return pipeline.velocity(x, t, replace(cond, jump=t - r))

    exact, quotient = exact_rate(u, x, t, v), quotient_rate(u, x, t, v, 3e-3, r, 1.0)
    assert float(exact.std()) > 1e-3
    assert float((exact - quotient).square().mean().sqrt()) < 0.01 * float(exact.square().mean().sqrt())
    nearer, farther = (pipeline.velocity(x, t, replace(cond, jump=j)) for j in (jump, jump + 0.1))
    assert not torch.allclose(nearer, farther, atol=1e-5), "it hears the jump"


def test_a_student_that_looks_ahead_is_told_how_far_each_step_goes(pipeline: Pipeline) -> None:
    student, told = told_copy(pipeline, "jump"), []
    real = student.denoiser.forward

    def watched(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.jump is not None
        told.append(cond.jump.tolist())
        return real(x, t, cond)  # type: ignore[no-any-return]

    student.denoiser.forward = watched
    for solver, jumps in (("euler", [0.25] * 4), ("consistency", [1.0, 0.75, 0.5, 0.25]), ("dpmpp_2m", [0.0] * 4)):
        told.clear()
        student("a red star", steps=4, guidance=1.0, solver=solver)
        assert [row for (row,) in told] == pytest.approx(jumps)
    told.clear()
    student("a red star", steps=2, guidance=2.0, solver="euler", negative="a ring")
    assert told == [[0.5, 0.5], [0.5, 0.5]], "both branches of guidance"


# Adversarial distillation


def test_the_hinge_is_zero_beyond_its_margins() -> None:
    ones = torch.ones(2, 3)
    assert hinge(ones, -ones).tolist() == [0, 0]
    assert hinge(0 * ones, 0 * ones).tolist() == [2, 2]  # the loss of a critic that knows nothing
    assert hinge(-ones, ones).tolist() == [4, 4]
    assert hinge(5 * ones, -5 * ones).tolist() == [0, 0]


def test_the_penalty_is_the_squared_gradient_of_logits_by_their_tokens() -> None:
    torch.manual_seed(0)
    heads, c = Heads([3, 7]).double(), torch.randn(4, 64, dtype=torch.float64)
    features = [torch.randn(4, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((5, 3), (2, 7))]
    logits, slopes = heads(features, c)
    gradients = torch.autograd.grad(logits.sum(), features)
    spreads = [tokens.var(-1, correction=0) + 1e-5 for tokens in features]
    own = [spread * g.square().sum(-1) for spread, g in zip(spreads, gradients, strict=True)]
    assert torch.allclose(slopes, torch.cat(own, dim=1), rtol=1e-9)
    assert slopes.shape == logits.shape == (4, 7)
    assert slopes.min() > 0


def test_what_a_critic_says_is_float32_under_autocast(pipeline: Pipeline, batch: Batch) -> None:
    method = LADDConfig().build(pipeline)
    with torch.autocast("cpu", torch.bfloat16):
        for turn in method.turns(0):
            assert method.loss(batch, turn, 0)[0].dtype == torch.float32


def test_the_critic_learns_to_tell_and_the_student_moves_towards_what_it_takes_for_real(pipeline: Pipeline, batch: Batch) -> None:
    method = LADDConfig(steps=2, r1=0.0, times=TimeDensity(mean=-1.0)).build(pipeline)
    critic, student = method.roles["critic"].module, method.student
    for role in ("student", "teacher"):
        method.roles[role].module.requires_grad_(False)
    torch.manual_seed(0)
    steps, accuracies = torch.optim.Adam(critic.parameters(), lr=3e-3), []
    for _ in range(15):
        loss, metrics = method.loss(batch, ("critic",), 0)
        steps.zero_grad()
        loss.backward()
        steps.step()
        accuracies.append(float(metrics["accuracy"].mean()))
    assert accuracies[-1] > 0.75 > 0.6 > accuracies[0]
    critic.requires_grad_(False)
    student.denoiser.requires_grad_(True)
    torch.manual_seed(1)
    before, _ = method.loss(batch, STUDENT, 0)
    before.backward()
    with torch.no_grad():
        for p in student.denoiser.parameters():
            assert p.grad is not None
            p -= 1e-3 * p.grad.sign()
    torch.manual_seed(1)
    assert loss_of(method, batch) < float(before.detach())
    assert all(p.grad is None for p in method.roles["teacher"].module.parameters())


def test_features_are_of_every_block_and_have_gradients(pipeline: Pipeline) -> None:
    for name, tokens in (("dit", [16, 16]), ("flux", [64, 64]), ("unet", None)):
        network = PreparedConfig(TEXT, NETWORKS[name]).build().requires_grad_(False)
        x = torch.randn(2, 3, 32, 32, requires_grad=True)
        features = block_features(network, x, torch.tensor([0.3, 0.8]), network.encode(["a", "b"]))
        assert len(features) == len(list(network.denoiser.blocks))  # type: ignore[arg-type]
        assert all(f.ndim == 3 for f in features)
        assert tokens is None or [f.shape[1] for f in features] == tokens, "those of the image alone"
        (gradient,) = torch.autograd.grad(features[-1].square().sum(), x)
        assert float(gradient.abs().max()) > 0


def test_pairs_are_what_the_critic_takes_for_real(pipeline: Pipeline, coupled: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = LADDConfig().build(pipeline), []
    real = method._judged

    def watched(x: Tensor, *rest: Any) -> Any:
        seen.append(x)
        return real(x, *rest)

    monkeypatch.setattr(method, "_judged", watched)
    method.loss(replace(coupled, images=torch.empty(8, 3, 0, 0)), ("critic",), 0)
    assert seen[1] is coupled.latents
    assert not torch.equal(seen[0], seen[1])


# Consistency in continuous time


def test_the_tangent_is_the_change_of_the_consistency_function() -> None:
    data, other = Gaussian(5), Gaussian(5)
    other.std = other.std.flip(0)
    x, a = torch.randn(4, 5, dtype=torch.float64), torch.tensor([1.5, 1.2, 0.7, 0.2], dtype=torch.float64)
    theirs, student = trigonometric(data.velocity), trigonometric(other.velocity)

    def f(x: Tensor, a: Tensor) -> Tensor:
        return a.cos()[:, None] * x - a.sin()[:, None] * student(x, a)

    v = theirs(x, a)
    g = tangent(student(x, a), v, exact_rate(student, x, a, v), x, a, 1.0)
    assert torch.allclose(g, a.cos()[:, None] * exact_rate(f, x, a, v), atol=1e-12)
    assert float(g.abs().max()) > 0.1
    quotient = tangent(student(x, a), v, quotient_rate(student, x, a, v, 1e-3, 0.0, math.pi / 2), x, a, 1.0)
    assert torch.allclose(quotient, g, atol=1e-4)


def test_a_consistent_student_has_no_tangent(pipeline: Pipeline, batch: Batch) -> None:
    mean, std = 0.2, 0.4
    spread = lambda t: ((1 - t) ** 2 * std**2 + t**2).sqrt()  # noqa: E731

    def exact(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        t = t[:, None, None, None]
        return (t - (1 - t) * std**2) / spread(t) ** 2 * (x - (1 - t) * mean) - mean

    def to_the_end(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        t = t[:, None, None, None]
        return (x - (mean + std / spread(t) * (x - (1 - t) * mean))) / t

    for difference in (0.0, 0.01):
        config = SCMConfig(guidance=1.0, warmup=2, difference=difference, times=TimeDensity(mean=0.5))
        method = config.build(pipeline)
        method.roles["teacher"].module.velocity = exact  # type: ignore[assignment]
        pipeline.velocity = exact  # type: ignore[method-assign]
        assert method.loss(batch, STUDENT, 0)[1]["tangent"].mean() > 0.05, "half-way, a velocity is no jump to the end"
        assert loss_of(method, batch, 1) > 0.01
        pipeline.velocity = to_the_end  # type: ignore[method-assign]
        assert method.loss(batch, STUDENT, 1)[1]["tangent"].max() < 2e-3
        assert loss_of(method, batch, 1) < 1e-3


# Teachers


def test_a_teacher_that_does_not_fit_is_refused(tiny: PipelineConfig, tmp_path: Path) -> None:
    student = tiny.build()
    tiny.build().save(tmp_path / "like")
    assert teacher_of(student, str(tmp_path / "like")).config.denoiser == student.config.denoiser
    with pytest.raises(UserError, match="predicts the data, and the student the velocity; start the student from its teacher"):
        teacher_of(replace(tiny, denoiser=tiny.denoiser.replace(prediction="velocity")).build(), str(tmp_path / "like"))
    other = replace(tiny, denoiser=tiny.denoiser.replace(prediction="velocity")).build()
    for config in (ProgressiveConfig, ConsistencyConfig, LCMConfig, SCMConfig, DMDConfig, LADDConfig, ADDConfig):
        with pytest.raises(UserError, match="predicts the data, and the student the velocity"):
            config(teacher=str(tmp_path / "like")).build(other)
    critic = DMDConfig(teacher=str(tmp_path / "like")).build(student).roles["critic"].module
    assert all(p.requires_grad for p in critic.parameters())
    assert torch.equal(critic.denoiser.head.weight, load(str(tmp_path / "like")).denoiser.head.weight)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="latents of another codec than the student's"):
        teacher_of(replace(tiny, codec=CODEC).build(), str(tmp_path / "like"))
    with pytest.raises(UserError, match="another path"):
        teacher_of(replace(tiny, path=DiscretePath()).build(), str(tmp_path / "like"))
    torch.manual_seed(1)
    replace(tiny, codec=CODEC).build().save(tmp_path / "latent")
    torch.manual_seed(2)
    with pytest.raises(UserError, match="latents of another codec than the student's"):  # one form, other weights
        teacher_of(replace(tiny, codec=CODEC).build(), str(tmp_path / "latent"))


# Every technique on three architectures, with all weights and with adapters, on pixels and on latents

TEXT = ByteEncoderConfig(width=32, depth=1, heads=2)
CODEC = KLConfig(widths=(4, 4), groups=2, layers=1, attention=False, channels=3, quant=False, scale=1.0)
NETWORKS: dict[str, DenoiserConfig] = {
    "dit": DiTConfig(width=32, depth=2, heads=2, patch=8, text_width=32),
    "flux": FluxConfig(
        width=32, joint=1, single=1, heads=2, axes=(4, 6, 6), patch=4, channels=3, guidance=False, text_width=32, pooled_width=32
    ),
    "unet": UNetConfig(widths=(8, 16), depths=(0, 1), heads=(1, 2), groups=4, channels=3, text_width=32, layers=1),
}
MMDIT = MMDiTConfig(width=32, depth=2, heads=2, patch=4, channels=3, text_width=32, pooled_width=32, table=8, base=8)
SETTINGS = [("dit", "pixels", "adapter"), ("dit", "latents", "all"), ("flux", "pixels", "all"), ("flux", "latents", "adapter")]
SETTINGS += [("unet", "pixels", "adapter"), ("unet", "latents", "all")]
TECHNIQUES: dict[str, MethodConfig] = {
    "guidance_distill": GuidanceDistillConfig(),
    "progressive": ProgressiveConfig(first=4, last=2, stage=1),
    "reflow": ReflowConfig(perceptual=1.0),
    "meanflow": MeanFlowConfig(),
    "ladd": LADDConfig(steps=2),
    "add": ADDConfig(OwnConfig(), steps=2),
    "scm": SCMConfig(),
    "lcm": LCMConfig(grid=10, skip=2),
    "consistency_training": ConsistencyTrainingConfig(stage=1),
}


class Scenes(Worlds):
    """Worlds with noise and latents of half the side where the codec halves it. If asked, the second batch stops the run, once."""

    def __init__(self, shape: tuple[int, int, int], stopping: bool = False) -> None:
        super().__init__(WorldsConfig(size=16))
        self.shape, self.stopping = shape, stopping

    def batch(self, number: int, size: int) -> Batch:
        if number == 1 and self.stopping:
            self.stopping = False
            raise Stopped("enough for now")
        generator = torch.Generator().manual_seed(number)
        latents, noise = torch.randn(2, size, *self.shape, generator=generator)
        return replace(super().batch(number, size), latents=latents, noise=noise)


def prepared(setting: tuple[str, str, str]) -> tuple[PreparedConfig, tuple[int, int, int]]:
    """The pipeline of a setting for pictures of 16 pixels a side, and the shape of its latents."""
    network, space, _ = setting
    codec, path = CODEC if space == "latents" else IdentityConfig(), DiscretePath() if network == "unet" else LinearPath()
    config = PreparedConfig(TEXT, NETWORKS[network], codec, Sampling(size=16, steps=2), path)
    return config, (3, 8, 8) if space == "latents" else (3, 16, 16)


@pytest.mark.parametrize("setting", SETTINGS, ids="-".join)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_trains_everywhere(name: str, setting: tuple[str, str, str], tmp_path: Path) -> None:
    pipeline, shape = prepared(setting)
    resumes = SETTINGS.index(setting) == list(TECHNIQUES).index(name) % len(SETTINGS)  # once for every technique, each in another setting
    train = TrainConfig(steps=2, batch=4, log=1, preview=9, evaluate=9, checkpoint=1 if resumes else 9, held_out=2)
    adapter = LoRAConfig(rank=2 if setting[2] == "adapter" else 0)
    run = RunConfig(pipeline, WorldsConfig(size=16), TECHNIQUES[name], OptimConfig(lr=1e-3, warmup=1), train, adapter=adapter)
    whole = Trainer(run, tmp_path / "whole", Scenes(shape))
    before = {name: p.clone() for name, p in whole.method.student.named_parameters()}
    whole.run()
    moved = {name for name, p in whole.method.student.named_parameters() if not torch.equal(p, before[name])}
    kinds = ("lora_", "embed_guidance", "embed_jump")
    assert moved
    assert all(any(kind in name for kind in kinds) for name in moved) is (setting[2] == "adapter")
    if not resumes:
        return
    for source in [Scenes(shape, stopping=True)] * 2:  # stopped, and gone on with
        with suppress(Stopped):
            Trainer(run, tmp_path / "parts", source).run()
    exports = [load_file(tmp_path / folder / "export" / "model.safetensors") for folder in ("whole", "parts")]
    assert exports[0].keys() == exports[1].keys()
    assert all(torch.equal(tensor, exports[1][key]) for key, tensor in exports[0].items())
