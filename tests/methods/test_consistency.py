"""Consistency functions: their boundary, and what theory says of the losses of LCM and of consistency training."""

import math
from dataclasses import replace

import pytest
import torch
from prepared import PreparedConfig
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import WorldsConfig
from mezzotint.flow.path import interpolate
from mezzotint.flow.time import TimeDensity, grid
from mezzotint.methods.consistency import pseudo_huber
from mezzotint.methods.consistency_training import ConsistencyTraining, ConsistencyTrainingConfig, interval
from mezzotint.methods.guidance_distill import guided_by
from mezzotint.methods.lcm import LCM, LCMConfig
from mezzotint.models import Cond, DenoiserConfig, DiTConfig, FluxConfig, UNetConfig
from mezzotint.pipeline import DiscretePath, LinearPath, Pipeline
from mezzotint.text import ByteEncoderConfig

STUDENT = ("student",)
TEXT = ByteEncoderConfig(width=32, depth=1, heads=2)
NETWORKS: dict[str, DenoiserConfig] = {
    "dit": DiTConfig(width=32, depth=2, heads=2, patch=8, text_width=32),
    "flux": FluxConfig(
        width=32, joint=1, single=1, heads=2, axes=(4, 6, 6), patch=4, channels=3, guidance=False, text_width=32, pooled_width=32
    ),
    "unet": UNetConfig(widths=(8, 16), depths=(0, 1), heads=(1, 2), groups=4, channels=3, text_width=32, layers=1),
}


@pytest.fixture
def batch() -> Batch:
    return WorldsConfig().build().batch(0, 8)


def loss_of(method: LCM | ConsistencyTraining, batch: Batch, step: int = 0) -> float:
    torch.manual_seed(0)
    return float(method.loss(batch, STUDENT, step)[0].detach())


def one_picture(x0: Tensor) -> object:
    """The exact velocity of data that is one picture: from anywhere, its end is that picture."""
    return lambda x, t, cond: (x - x0) / t[:, None, None, None].clamp_min(1e-6)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_at_the_boundary_the_output_is_the_input(name: str) -> None:
    path = DiscretePath() if name == "unet" else LinearPath()
    pipeline = PreparedConfig(TEXT, NETWORKS[name], path=path).build()
    lcm, training = LCMConfig().build(pipeline), ConsistencyTrainingConfig().build(pipeline)
    x, t, w, prompts = torch.randn(2, 3, 16, 16), torch.tensor([0.0, 0.5]), torch.tensor([1.0, 3.0]), ["a red star", "two rings"]
    for y in (lcm.data(lcm.student, prompts, w, x, t), training.data(prompts, x, t)):
        assert torch.equal(y[0], x[0])
        assert not torch.allclose(y[1], x[1], atol=0.1)


def test_the_distance_is_that_of_the_paper_up_to_scale() -> None:
    a, b = torch.randn(2, 4, 3, 8, 8)
    c = 0.00054 * math.sqrt(3 * 8 * 8)
    theirs = ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c
    assert torch.allclose(math.sqrt(3 * 8 * 8) * pseudo_huber(a - b, 0.00054), theirs)
    assert pseudo_huber(0 * a, 0.1).tolist() == [0] * 4


# LCM


def test_an_exact_flow_has_no_loss_and_a_student_that_is_off_has_one(pipeline: Pipeline, batch: Batch) -> None:
    batch = replace(batch, images=torch.full_like(batch.images, 0.3))
    for scales in ((2.0, 2.0), (1.5, 4.0)):
        method = LCMConfig(scales=scales).build(pipeline)
        for role in method.roles.values():
            role.module.velocity = one_picture(torch.full((3, 32, 32), 0.3))  # type: ignore[assignment]
        assert loss_of(method, batch) < 1e-5
        method.student.velocity = one_picture(torch.full((3, 32, 32), -0.3))  # type: ignore[method-assign, assignment]
        assert loss_of(method, batch) == pytest.approx(0.6, abs=2e-3)


def test_the_scale_is_told_and_the_teacher_is_guided_by_it(pipeline: Pipeline, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    method, told = LCMConfig(scales=(1.5, 4.0), grid=10, skip=1).build(pipeline), []
    for name in ("student", "target"):
        role = method.pipeline(name)

        def watched(x: Tensor, t: Tensor, cond: Cond, real: object = role.velocity) -> Tensor:
            assert cond.guidance is not None
            told.append((cond.guidance, t))
            return real(x, t, cond)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(role, "velocity", watched)
    from mezzotint.methods import lcm

    scales, real = [], lcm.guided_by

    def guided(pipeline: Pipeline, cond: Cond, scale: Tensor, x: Tensor, t: Tensor) -> Tensor:
        scales.append((scale, t))
        return real(pipeline, cond, scale, x, t)

    monkeypatch.setattr(lcm, "guided_by", guided)
    loss_of(method, batch)
    (target, s), (student, t), (teacher, at) = *told, *scales
    assert torch.equal(target, student)
    assert torch.equal(teacher, student)
    assert torch.equal(at, t)
    assert torch.allclose(t - s, torch.tensor(0.1))
    assert student.min() >= 1.5
    assert student.max() <= 4
    assert student.std() > 0.3


def test_at_first_the_student_is_its_teacher_whatever_it_is_told(pipeline: Pipeline) -> None:
    method = LCMConfig().build(pipeline)
    x, t, prompts = torch.randn(2, 3, 32, 32), torch.tensor([0.4, 1.0]), ["a", "b"]
    whole = pipeline.velocity(x, t, pipeline.encode(prompts))
    for name in ("student", "target"):
        end = method.data(method.pipeline(name), prompts, torch.tensor([1.5, 4.0]), x, t)
        assert torch.equal(end, x - t[:, None, None, None] * whole)
    fixed = LCMConfig(scales=(2.0, 2.0)).build(pipeline)
    assert fixed.student is pipeline, "nothing to tell"
    again = LCMConfig().build(method.student)
    assert again.student is method.student, "told by the teacher's own embedding,"
    torch.nn.init.normal_(method.student.denoiser.embed_guidance.mlp[-1].weight)  # type: ignore[union-attr, index]
    cond, w = method.student.encode(prompts), torch.tensor([1.5, 4.0])
    told = method.student.velocity(x, t, replace(cond, guidance=w))
    assert torch.equal(guided_by(method.student, cond, w, x, t), told), "which is how it is guided"
    assert not torch.allclose(told, whole, atol=1e-3)


def test_the_target_follows_the_student_and_odd_settings_are_refused(pipeline: Pipeline) -> None:
    method = LCMConfig(decay=0.75).build(pipeline)
    head = lambda name: method.pipeline(name).denoiser.head.weight  # type: ignore[union-attr]  # noqa: E731
    before = head("target").clone()
    with torch.no_grad():
        head("student").add_(1.0)
    method.after_step(0)
    assert torch.allclose(head("target") - before, torch.tensor(0.25), atol=1e-5)
    with pytest.raises(ValueError, match="scales must be two that rise from 1 on"):
        LCMConfig(scales=(3.0, 2.0)).build(pipeline)
    with pytest.raises(ValueError, match=r"skip must be within \[1, 10\], got 11"):
        LCMConfig(grid=10, skip=11).build(pipeline)


# Consistency training


def test_the_number_of_steps_doubles_as_in_the_paper() -> None:
    total, config = 800, ConsistencyTrainingConfig()
    stage = total // (int(math.log2(config.last // config.first)) + 1)  # K' of iCT, section 3.4
    config = config.replace(stage=stage)
    assert config.stages == total / stage
    assert [config.steps(k) for k in range(total)] == [min(10 * 2 ** (k // stage), 1280) for k in range(total)]
    assert config.steps(10**9) == 1280


def test_intervals_are_drawn_as_often_as_the_log_normal_says() -> None:
    torch.manual_seed(0)
    ends, number = grid(10, 1.0), 20_000
    t, s = interval(TimeDensity(mean=-1.1, std=2.0).sample(number), ends)
    assert torch.allclose(t - s, torch.tensor(0.1))
    normal = torch.distributions.Normal(0.0, 1.0)
    logits = ends.double().logit()  # the logarithm of iCT's noise level
    expected = -normal.cdf((logits + 1.1) / 2.0).diff()
    found = torch.stack([(t == end).float().mean() for end in ends[:-1]])
    assert torch.allclose(found.double(), expected, atol=2e-3)
    assert [x.tolist() for x in interval(torch.tensor([1.0, 0.0, 0.95]), torch.tensor([0.9, 0.4, 0.0]))] == [
        pytest.approx([0.9, 0.4, 0.9]),
        pytest.approx([0.4, 0.0, 0.4]),
    ]


def test_the_loss_of_data_that_are_one_picture_is_zero_and_its_steps_share_picture_and_noise(pipeline: Pipeline, batch: Batch) -> None:
    batch = replace(batch, images=torch.full_like(batch.images, 0.3))
    method = ConsistencyTrainingConfig(stage=1).build(pipeline)
    assert loss_of(method, batch) > 0.1
    pipeline.velocity = one_picture(torch.full((3, 32, 32), 0.3))  # type: ignore[method-assign, assignment]
    assert loss_of(method, batch) < 1e-4
    seen: list[tuple[Tensor, Tensor]] = []

    def identity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append((x, t))
        return 0 * x

    pipeline.velocity = identity  # type: ignore[method-assign, assignment]
    # f(x, t) = x: the difference is (t - s) (eps - x0), its weight 1 / (t - s).
    found = loss_of(method, batch)
    (x_t, t), (x_s, s) = seen
    velocity = (x_t - x_s) / (t - s)[:, None, None, None]
    assert torch.allclose(interpolate(batch.images, batch.images + velocity, t), x_t, atol=1e-4)
    assert found == pytest.approx(float(velocity.square().flatten(1).mean(1).sqrt().mean()), rel=0.02)
