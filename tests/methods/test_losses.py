"""What every loss is where its networks are known: signs, weights, guidance, and where gradients may not go.

Networks are replaced by velocities that are numbers, or that lead to one picture, so that the loss is a formula of a few letters.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bright import BRIGHT
from exact import Gaussian
from torch import Tensor, nn

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import WorldsConfig
from mezzotint.flow.path import from_velocity, interpolate, like
from mezzotint.flow.solvers import grpo, transition
from mezzotint.flow.time import TimeDensity
from mezzotint.methods import adversarial, ladd, reflow
from mezzotint.methods.add import ADDConfig
from mezzotint.methods.consistency import ConsistencyConfig, pseudo_huber
from mezzotint.methods.consistency_training import ConsistencyTrainingConfig
from mezzotint.methods.denoise import DenoiseConfig, levelled, roughness
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.flow_grpo import FlowGRPOConfig, Transition
from mezzotint.methods.guidance_distill import GuidanceDistillConfig
from mezzotint.methods.ladd import LADDConfig
from mezzotint.methods.lcm import LCMConfig
from mezzotint.methods.meanflow import MeanFlowConfig
from mezzotint.methods.method import Method
from mezzotint.methods.progressive import ProgressiveConfig
from mezzotint.methods.refl import ReFLConfig
from mezzotint.methods.reflow import ReflowConfig
from mezzotint.methods.repa import TransformersConfig
from mezzotint.methods.scm import SCMConfig
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline

STUDENT, CRITIC = ("student",), ("critic",)
HALF = TimeDensity(std=1e-6)  # t = 1/2
Velocity = Callable[[Tensor, Tensor, Cond], Tensor]


def number(value: Tensor | float) -> Velocity:
    """A velocity that is one number."""
    return lambda x, t, cond: torch.zeros_like(x) + value


def leads_to(value: Tensor | float) -> Velocity:
    """The velocity of data that are one picture of one number."""
    return lambda x, t, cond: (x - value) / like(t, x)


def guided_to(value: float, w: float, make: Callable[[Tensor], Velocity] = number) -> Velocity:
    """One that is `value` under guidance w, and 0.3 without a prompt."""
    unguided = 0.3
    prompted = unguided + (value - unguided) / w

    def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        there = cond.mask.any(1)[:, None, None, None]
        return make(torch.where(there, prompted, unguided))(x, t, cond)

    return velocity


def put(method: Method, **velocities: Velocity) -> None:
    for name, velocity in velocities.items():
        method.pipeline(name).velocity = velocity  # type: ignore[method-assign, assignment]


def letter(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def slopes(loss: Tensor, *letters: Tensor) -> list[float | None]:
    found = torch.autograd.grad(loss, letters, allow_unused=True)
    return [None if slope is None else float(slope) for slope in found]


def grey(value: float, rows: int = 8) -> Batch:
    """A batch of pictures of one grey."""
    batch = WorldsConfig(size=8).build().batch(0, rows)
    return replace(batch, images=torch.full((rows, 3, 8, 8), value))


# Flow matching


def test_the_level_and_the_detail_weigh_the_loss(pipeline: Pipeline) -> None:
    assert levelled(torch.tensor([0.25, 0.5, 0.9]), 0.5).tolist() == [0.25, 1.0, 1.0]
    loss, metrics = DenoiseConfig(level=0.9).build(pipeline).loss(grey(0.1), STUDENT, 0)
    assert float(loss.detach()) == pytest.approx(float((levelled(metrics["t"], 0.9) * metrics["loss"]).mean()), rel=1e-6)
    assert float(loss.detach()) < 0.9 * float(metrics["loss"].mean())
    method, error = DenoiseConfig(detail=3.0).build(pipeline), torch.rand(3, 8, 8)
    put(method, student=lambda x, t, cond: leads_to(0.1)(x, t, cond) + error)
    loss, metrics = method.loss(grey(0.1), STUDENT, 0)
    assert metrics["loss"].tolist() == pytest.approx([float(error.square().mean())] * 8, rel=1e-3)
    assert float(loss.detach()) == pytest.approx(float(error.square().mean() + 3 * roughness(error[None])), rel=1e-3)


# DMD


def test_the_direction_of_dmd_is_scaled_by_the_distance_from_the_guided_teacher(pipeline: Pipeline) -> None:
    method = DMDConfig(guidance=3.0).build(pipeline)
    put(method, teacher=guided_to(0.5, 3.0, leads_to), critic=leads_to(-0.1))
    direction = method._direction(torch.zeros(2, 3, 8, 8), torch.full((2,), 0.5), ["a", "b"])
    assert torch.allclose(direction, torch.full_like(direction, (-0.1 - 0.5) / 0.5), atol=1e-4)


def test_the_loss_of_dmd_is_half_the_square_of_the_direction_and_moves_the_student_to_the_teacher(pipeline: Pipeline) -> None:
    theta = letter(0.2)
    method = DMDConfig(steps=2, guidance=1.0).build(pipeline)
    put(method, student=leads_to(theta), teacher=leads_to(0.5), critic=leads_to(theta * 0 - 0.1))
    loss, metrics = method.loss(grey(0.0), STUDENT, 0)
    g = (-0.1 - 0.5) / 0.3
    assert float(loss.detach()) == pytest.approx(g**2 / 2, rel=1e-3)
    assert metrics["direction"].tolist() == pytest.approx([-g] * 8, rel=1e-3)
    assert slopes(loss, theta) == [pytest.approx(g, rel=1e-3)], "downhill is up, where the teacher's data are"


def test_scores_are_compared_within_the_span_and_the_critic_learns_everywhere(pipeline: Pipeline) -> None:
    method = DMDConfig(steps=2, span=(0.3, 0.4)).build(pipeline)
    times = {turn: method.loss(grey(0.0, 64), turn, 0)[1]["t"] for turn in (STUDENT, CRITIC)}
    assert 0.3 <= float(times[STUDENT].min()) < 0.31 < 0.39 < float(times[STUDENT].max()) <= 0.4
    assert float(times[CRITIC].min()) < 0.05 < 0.95 < float(times[CRITIC].max())
    with pytest.raises(ValueError, match="span must be within"):
        DMDConfig(span=(0.5, 0.4)).build(pipeline)


def test_the_critic_of_dmd_learns_the_students_samples_alone(pipeline: Pipeline) -> None:
    theta, phi = letter(0.7), letter(0.2)
    method = DMDConfig(steps=2, critic_turns=3, level=1.0, times=HALF).build(pipeline)
    put(method, student=leads_to(theta), critic=leads_to(phi))
    assert method.turns(0) == [CRITIC] * 3 + [STUDENT]
    loss, metrics = method.loss(grey(0.0), CRITIC, 0)
    assert metrics["loss"].tolist() == pytest.approx([0.5**2 / 0.5**2] * 8, rel=1e-4)  # the error of a velocity is that of data over t
    assert float(loss.detach()) == pytest.approx(0.5**2, rel=1e-4)  # and its weight t^2
    assert slopes(loss, phi, theta) == [pytest.approx(-2 * 0.5, rel=1e-4), None]


def test_gradients_of_dmd_go_through_the_last_step_which_starts_at_its_own_noise(pipeline: Pipeline) -> None:
    theta = letter(0.0)
    method = DMDConfig(steps=2).build(pipeline)
    put(method, student=lambda x, t, cond: (1 + theta) * x)
    random.seed(next(seed for seed in range(9) if random.Random(seed).randrange(2) == 1))  # two steps, at 1 and at 1/2
    x = method._draw(grey(0.0, 64))
    entered = 2 * x.detach()  # x = (1 - (1 + theta) / 2) entered, and what went before is 0
    assert float(entered.std()) == pytest.approx(0.5, rel=0.02)
    assert slopes(x.sum(), theta) == [pytest.approx(float(-entered.sum() / 2), rel=1e-3)]


# DPO


def test_the_loss_of_dpo_where_all_errors_are_known(pipeline: Pipeline) -> None:
    theta, reference, beta = torch.tensor(-0.2), 0.1, 5.0
    method = DPOConfig(beta=beta).build(pipeline)
    put(
        method,
        student=lambda x, t, cond: torch.zeros_like(x) + theta * like(t, x),
        reference=lambda x, t, cond: 0 * x + reference * like(t, x),
    )
    winner, loser = 0.6, -0.4
    batch = replace(grey(winner), rejected=grey(loser).images)
    _, metrics = method.loss(batch, STUDENT, 0)
    # ||theta t - eps + x0||^2: what has eps in it is the same for winner and loser, so it cancels.
    advantage = 2 * metrics["t"] * (-0.2 - reference) * (winner - loser)
    expected = torch.log1p((beta / 2 * advantage).exp())
    assert torch.allclose(metrics["preference"], expected, atol=1e-5)
    assert metrics["accuracy"].tolist() == [1.0] * 8, "nearer to the winner than the reference is, and farther from the loser"
    anchored, metrics = DPOConfig(beta=beta, anchor=0.5).build(pipeline).loss(batch, STUDENT, 0)
    assert float(anchored.detach()) == pytest.approx(float((metrics["preference"] + 0.5 * metrics["winner"]).mean()), rel=1e-5)


# Flow-GRPO

GRPO = FlowGRPOConfig(goal=BRIGHT, group=4, steps=4, kl=0.5, clip=0.002)


def moved(theta: float, advantage: float, law_level: float = 0.7) -> Transition:
    """A step that a policy v = theta drew at t = 0.7."""
    torch.manual_seed(0)
    x, t, s = torch.randn(8, 3, 8, 8), torch.full((8,), 0.7), torch.full((8,), 0.6)
    mean, std = transition(x, torch.full_like(x, theta), t, s, grpo(law_level))
    after = mean + like(std, x) * torch.randn_like(x)
    density = torch.distributions.Normal(mean, like(std, x)).log_prob(after).flatten(1).mean(1)
    nothing = torch.zeros(8)
    sign = torch.tensor([1.0, -1.0] * 4)
    own: dict[str, Any] = {"after": after, "t": t, "s": s, "log_prob": density, "advantage": advantage * sign}
    return Transition(x, ["a"] * 8, ["a"] * 8, reward=nothing, held_out=nothing, diversity=0.0, **own)


def test_the_gradient_of_flow_grpo_is_the_policy_gradient_where_the_policy_drew(pipeline: Pipeline) -> None:
    theta = letter(0.3)
    method = GRPO.build(pipeline)
    put(method, student=number(theta), reference=number(0.3))
    step = moved(0.3, advantage=2.0)
    loss, metrics = method.loss(step, STUDENT, 0)
    assert torch.allclose(metrics["ratio"], torch.ones(8), atol=1e-5)
    mean, std = transition(step.images, number(theta)(step.images, step.t, None), step.t, step.s, grpo(0.7))  # type: ignore[arg-type]
    density = torch.distributions.Normal(mean, like(std, mean).expand_as(mean)).log_prob(step.after).flatten(1).mean(1)
    assert slopes(loss, theta) == [pytest.approx(slopes(-(step.advantage * density).mean(), theta)[0], rel=1e-3)]


def test_the_loss_of_flow_grpo_off_its_policy(pipeline: Pipeline) -> None:
    theta = letter(0.8)
    method = GRPO.build(pipeline)
    put(method, student=number(theta), reference=number(0.1))
    g, dt = 0.7 * math.sqrt(0.7 / 0.3), 0.1
    weight = dt / 2 * (1 / g + g * 0.3 / 1.4) ** 2  # of the squared difference of velocities in the divergence
    step = moved(0.3, advantage=2.0)
    loss, metrics = method.loss(step, STUDENT, 0)
    assert torch.allclose(metrics["kl"], torch.full((8,), weight * 0.7**2), rtol=1e-4)
    clipped = metrics["ratio"].clamp(0.998, 1.002)
    expected = torch.maximum(-step.advantage * metrics["ratio"], -step.advantage * clipped) + 0.5 * metrics["kl"]
    assert float(loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert torch.equal(metrics["clipped"], ((metrics["ratio"] - 1).abs() > 0.002).float())
    assert float(metrics["clipped"].mean()) > 0
    alone, _ = method.loss(moved(0.3, advantage=0.0), STUDENT, 0)
    assert slopes(alone, theta) == [pytest.approx(0.5 * 2 * weight * 0.7, rel=1e-3)], "it draws the policy back to its first weights"


# ReFL


def test_refl_rates_the_clean_estimate_wherever_it_stops_and_weighs_it(pipeline: Pipeline) -> None:
    losses = []
    for weight in (1.0, 3.0):
        method = ReFLConfig(BRIGHT, steps=4, last=4, margin=1.0, weight=weight, anchor=0.0).build(pipeline)
        theta = letter(0.25)
        put(method, student=leads_to(theta))
        for seed in range(3):
            random.seed(seed)
            loss, metrics = method.loss(grey(0.0, 4), STUDENT, 0)
            assert float(metrics["reward"]) == pytest.approx(0.25, abs=1e-5), "the end of the path, and not the next step on it"
        losses.append(float(loss.detach()))
        (slope,) = slopes(loss, theta)
        assert slope is not None
        assert slope < 0, "downhill is brighter"
    assert losses == pytest.approx([0.75, 2.25], rel=1e-4)


# Students


def test_guidance_distillation_learns_the_guided_velocity_at_its_scale(pipeline: Pipeline) -> None:
    method = GuidanceDistillConfig(largest=4.0, level=0.9).build(pipeline)
    scales: list[Tensor] = []

    def student(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.guidance is not None
        scales.append(cond.guidance)
        return torch.zeros_like(x)

    put(method, teacher=guided_to(0.4, 1.0), student=student)
    loss, metrics = method.loss(grey(0.0), STUDENT, 0)
    assert 1 <= scales[0].min() < scales[0].max() <= 4
    assert torch.allclose(metrics["loss"], (0.3 + scales[0] * 0.1).square(), rtol=1e-4)
    assert float(loss.detach()) == pytest.approx(float((levelled(metrics["t"], 0.9) * metrics["loss"]).mean()), rel=1e-5)


def test_progressive_distillation_weighs_the_error_of_velocities_by_the_truncated_snr(pipeline: Pipeline) -> None:
    method, theta = ProgressiveConfig(first=8, last=4, stage=1, guidance=3.0).build(pipeline), letter(0.1)
    put(method, student=number(theta), teacher=guided_to(0.4, 3.0))
    loss, metrics = method.loss(grey(0.0), STUDENT, 0)
    t = metrics["t"]
    assert torch.allclose(metrics["loss"], torch.maximum((1 - t) ** 2, t**2) * 0.3**2, rtol=1e-4)
    assert slopes(loss, theta) == [pytest.approx(-2 * 0.3 * float(torch.maximum((1 - t) ** 2, t**2).mean()), rel=1e-4)]


def coupled(rows: int = 8) -> Batch:
    """Noise and the sample that belongs to it."""
    torch.manual_seed(1)
    return replace(grey(0.0, rows), latents=torch.full((rows, 3, 8, 8), 0.2), noise=torch.randn(rows, 3, 8, 8))


def test_the_terms_of_reflow(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    told = [[theirs.expand(8, 5, 2)], [ours.expand(8, 5, 2)]]  # asked first of the sample, then of the student's
    monkeypatch.setattr(reflow, "block_features", lambda *arguments: told.pop(0))
    loss, metrics = ReflowConfig(ones=0.0, level=0.9, perceptual=0.25).build(pipeline).loss(coupled(), STUDENT, 0)
    assert metrics["perceptual"].tolist() == pytest.approx([2.0] * 8), "of unit vectors that have nothing in common"
    expected = (levelled(metrics["t"], 0.9) * metrics["loss"]).mean() + 0.25 * 2
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_mean_flow_has_no_loss_where_the_student_knows_the_mean_velocity(pipeline: Pipeline) -> None:
    data, told = Gaussian(3), list[Tensor]()
    shape = lambda f: lambda x, *times: f(x.movedim(1, -1), *(t[:, None, None, None] for t in times)).movedim(-1, 1)  # noqa: E731
    velocity, move = shape(lambda x, t: data.velocity(x, t)), shape(data.move)

    def student(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.jump is not None
        told.append(cond.jump.detach())
        return (x - move(x, t, t - cond.jump)) / like(cond.jump, x)

    method = MeanFlowConfig(guidance=1.0, same=0.0, power=0.0, times=TimeDensity(std=0.5)).build(pipeline)
    put(method, student=student, teacher=lambda x, t, cond: velocity(x, t))
    assert float(method.loss(grey(0.1), STUDENT, 0)[0].detach()) < 1e-6
    assert told[-1].min() > 0
    put(method, student=lambda x, t, cond: velocity(x, t))
    assert float(method.loss(grey(0.1), STUDENT, 0)[0].detach()) > 1e-3, "which the velocity at the start of a step is not"


def test_mean_flow_weighs_by_its_error_and_learns_from_the_guided_teacher(pipeline: Pipeline) -> None:
    method, theta = MeanFlowConfig(guidance=3.0, power=0.5).build(pipeline), letter(0.1)
    put(method, student=number(theta), teacher=guided_to(0.4, 3.0))
    loss, metrics = method.loss(grey(0.0), STUDENT, 0)
    assert metrics["error"].tolist() == pytest.approx([0.3**2] * 8, rel=1e-4)
    weight = (0.3**2 + 1e-3) ** -0.5
    assert float(loss.detach()) == pytest.approx(weight * 0.3**2, rel=1e-4)
    assert slopes(loss, theta) == [pytest.approx(-2 * 0.3 * weight, rel=1e-4)], "the weight is no part of the gradient"


def test_scm_moves_the_student_along_its_normalised_tangent(pipeline: Pipeline) -> None:
    method, theta = SCMConfig(guidance=3.0, warmup=10**9, times=HALF).build(pipeline), letter(0.1)
    put(method, student=number(theta), teacher=guided_to(0.4, 3.0))
    loss, metrics = method.loss(grey(0.0), STUDENT, 0)
    x, t = torch.zeros(1, 3, 8, 8), torch.full((1,), 0.5)
    by_velocity = float((from_velocity(x + 1, "vp_velocity", x, t) - from_velocity(x, "vp_velocity", x, t)).mean())
    size = math.cos(math.pi / 4) ** 2 * abs(by_velocity) * 0.3  # at r = 0 the tangent is the difference from the teacher
    assert metrics["tangent"].tolist() == pytest.approx([size] * 8, rel=1e-3)
    assert float(loss.detach()) == pytest.approx((size / (size + 0.1)) ** 2, rel=1e-3)
    assert slopes(loss, theta) == [pytest.approx(-2 * size / (size + 0.1) * by_velocity, rel=1e-3)], "towards the teacher"
    sizes = []
    for step in (0, 1, 5):
        torch.manual_seed(0)
        method = SCMConfig(guidance=1.0, warmup=2, times=HALF).build(pipeline)
        put(method, student=lambda x, t, cond: x, teacher=lambda x, t, cond: x)  # whose paths are no straight lines
        sizes.append(method.loss(grey(0.0), STUDENT, step)[1]["tangent"])
    assert sizes[1].min() > 0.01, "at r = 1 it is more than that difference, which is zero here"
    assert torch.allclose(sizes[0], sizes[1] / 2)
    assert torch.equal(sizes[2], sizes[1])


def test_the_loss_of_consistency_distillation_in_numbers(pipeline: Pipeline) -> None:
    theta, phi, grid = letter(0.5), letter(0.1), 4
    method = ConsistencyConfig(guidance=3.0, grid=grid, segments=1, huber=0.2).build(pipeline)
    put(method, student=number(theta), target=number(phi), teacher=guided_to(-0.2, 3.0))
    loss, metrics = method.loss(grey(0.0), STUDENT, 0)
    t = metrics["t"]
    s = t - 1 / grid
    # From x_t the student goes straight to 0; the teacher to s, and the target from there.
    difference = (t * -0.5 - (s - t) * -0.2 - -s * 0.1) / t
    assert torch.allclose(metrics["loss"], (difference.square() + 0.04).sqrt() - 0.2, atol=1e-5)
    expected = float((difference / (difference.square() + 0.04).sqrt() * -1).mean())
    assert slopes(loss, theta, phi) == [pytest.approx(expected, rel=1e-3), None], "the target has no gradient"


def test_the_loss_of_lcm_in_numbers(pipeline: Pipeline) -> None:
    theta, phi = letter(0.5), letter(0.1)
    method = LCMConfig(scales=(3.0, 3.0), grid=10, skip=2).build(pipeline)
    put(method, student=number(theta), target=number(phi), teacher=guided_to(-0.2, 3.0))
    loss, metrics = method.loss(grey(0.0), STUDENT, 0)
    t = metrics["t"]
    s = t - 0.2
    difference = -t * 0.5 - (s - t) * -0.2 + s * 0.1
    assert torch.allclose(metrics["loss"], pseudo_huber(difference[:, None], 1e-3), atol=1e-5)
    sign = float((-t * difference / (difference.square() + 1e-6).sqrt()).mean())
    assert slopes(loss, theta, phi) == [pytest.approx(sign, rel=1e-3), None]


def test_the_target_of_consistency_training_has_no_gradient(pipeline: Pipeline) -> None:
    theta, seen = letter(0.5), list[tuple[Tensor, Tensor]]()
    method = ConsistencyTrainingConfig(first=4, last=4, huber=0.1).build(pipeline)

    def student(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x) + theta

    put(method, student=student)
    loss, _ = method.loss(grey(0.0), STUDENT, 0)
    (x_t, t), (x_s, s) = seen
    difference = x_t - x_s - like(t - s, x_t) * 0.5
    size = (difference.square().flatten(1).mean(1) + 0.01).sqrt()
    expected = (difference.flatten(1).mean(1) * -t / size / (t - s)).mean()
    assert slopes(loss, theta) == [pytest.approx(float(expected), rel=1e-3)]


# Critics


def test_the_losses_of_ladd_in_numbers(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    theta, phi = letter(-0.2), letter(1.0)
    method = LADDConfig(steps=2, r1=0.1).build(pipeline)
    put(method, student=leads_to(theta))
    monkeypatch.setattr(method, "_judged", lambda x, eps, t, prompts: (phi * x.flatten(1), torch.full((8, 4), 3.0)))
    loss, _ = method.loss(grey(0.5), STUDENT, 0)
    assert float(loss.detach()) == pytest.approx(0.2, abs=1e-5)
    assert slopes(loss, theta) == [pytest.approx(-1.0, rel=1e-4)], "towards what the critic takes for real"
    loss, metrics = method.loss(grey(0.5), CRITIC, 0)
    assert float(loss.detach()) == pytest.approx(0.5 + 0.8 + 0.1 * 3, rel=1e-4)
    assert metrics["accuracy"].tolist() == [1.0] * 8
    assert slopes(loss, phi, theta) == [pytest.approx(-0.5 - 0.2, rel=1e-4), None]


def test_the_critic_of_ladd_sees_what_is_noised_again(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = LADDConfig().build(pipeline), list[Tensor]()
    x, eps, t = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.8])
    real = ladd.block_features
    monkeypatch.setattr(ladd, "block_features", lambda pipeline, y, *rest: (seen.append(y), real(pipeline, y, *rest))[1])
    method._judged(x, eps, t, ["a", "b"])
    assert torch.equal(seen[0], interpolate(x, eps, t))


def test_half_of_the_signs_right_is_an_accuracy_of_a_half() -> None:
    real, fake = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), torch.tensor([[-1.0, -1.0], [1.0, -1.0]])
    assert adversarial.accuracy(real, fake).tolist() == [1.0, 0.5]


class Known(nn.Module):
    """A critic whose logit is the mean of what it is given, times phi, and whose slopes are 3."""

    def __init__(self, phi: Tensor) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, features: list[Tensor], text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.phi * features[0].flatten(1).mean(1, keepdim=True), torch.full((len(text), 1), 3.0)


def test_the_losses_of_add_in_numbers(dino: str, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    theta, phi = letter(-0.2), letter(1.0)
    method = ADDConfig(TransformersConfig(dino), steps=2, guidance=3.0, weight=2.0, r1=0.1, times=HALF).build(pipeline)
    method.roles["critic"].module = Known(phi)
    monkeypatch.setattr(method, "_features", lambda pictures: [pictures.flatten(2).mT])
    put(method, student=leads_to(theta), teacher=guided_to(0.4, 3.0, leads_to))
    loss, _ = method.loss(grey(0.5), STUDENT, 0)
    weight = 0.5 / math.sqrt(0.5)
    assert float(loss.detach()) == pytest.approx(0.2 + 2 * weight * 0.6**2, rel=1e-3)
    assert slopes(loss, theta) == [pytest.approx(-1 - 2 * weight * 2 * 0.6, rel=1e-3)]
    loss, _ = method.loss(grey(0.5), CRITIC, 0)
    assert float(loss.detach()) == pytest.approx(0.5 + 0.8 + 0.1 * 3, rel=1e-3)
    assert slopes(loss, phi, theta) == [pytest.approx(-0.7, rel=1e-3), None]
