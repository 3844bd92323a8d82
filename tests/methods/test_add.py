"""ADD: where its losses are known, what its critic sees, and where gradients go."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mezzotint.codecs.kl import KLConfig
from mezzotint.data.batch import Batch
from mezzotint.data.worlds import WorldsConfig
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.add import ADD, ADDConfig, features
from mezzotint.methods.repa import TransformersConfig, Vision
from mezzotint.pipeline import Pipeline, PipelineConfig

STUDENT, CRITIC = ("student",), ("critic",)
HALF_WAY = TimeDensity(std=1e-6)  # t = 1/2


@pytest.fixture
def add(dino: str, pipeline: Pipeline) -> ADD:
    return ADDConfig(TransformersConfig(dino), steps=2, guidance=1.0, r1=0.0, times=HALF_WAY).build(pipeline)


@pytest.fixture
def batch() -> Batch:
    return WorldsConfig().build().batch(0, 4)


def ends_at(role: nn.Module, picture: Tensor) -> None:
    """Replace a network by the exact velocity of data that is one picture."""
    role.velocity = lambda x, t, cond: (x - picture) / t[:, None, None, None]  # type: ignore[assignment]


def test_a_student_whose_pictures_are_real_leaves_nothing_to_tell_and_nothing_to_learn(add: ADD, batch: Batch) -> None:
    batch = replace(batch, images=torch.full_like(batch.images, 0.3))
    for name in ("student", "teacher"):
        ends_at(add.roles[name].module, batch.images[0])
    loss, metrics = add.loss(batch, CRITIC, 0)
    assert float(loss.detach()) == pytest.approx(2, abs=1e-5), "logits of real and fake are the same, within the margins"
    assert metrics["accuracy"].tolist() == pytest.approx([0.5] * 4, abs=1e-2)
    assert add.loss(batch, STUDENT, 0)[1]["distance"].max() < 1e-9


def test_the_teachers_term_is_the_squared_distance_of_what_it_sees_with_its_weight(add: ADD, batch: Batch) -> None:
    theta = torch.tensor(0.1, requires_grad=True)
    add.student.velocity = lambda x, t, cond: (x - theta) / t[:, None, None, None]  # type: ignore[method-assign, assignment]
    ends_at(add.roles["teacher"].module, torch.tensor(0.5))
    weight = 0.5 / math.sqrt(0.5)  # alpha / n at t = 1/2
    _, metrics = add.loss(batch, STUDENT, 0)
    assert metrics["distance"].tolist() == pytest.approx([weight * 0.4**2] * 4, rel=1e-4)
    x = theta.expand(4, 3, 32, 32)
    distance = add._distance(x, x, add.pipeline("teacher").encode(batch.prompts))
    (slope,) = torch.autograd.grad(distance.mean(), theta)
    assert float(slope) == pytest.approx(-2 * weight * 0.4, rel=1e-4), "it moves to what the teacher sees, which itself has no gradient"


@pytest.mark.parametrize("latent", [False, True], ids=["pixels", "latents"])
def test_gradients_go_to_the_role_of_the_turn(latent: bool, dino: str, tiny: PipelineConfig, batch: Batch) -> None:
    codec = KLConfig(widths=(4, 4), groups=2, layers=1, attention=False, channels=3, quant=False, scale=1.0) if latent else tiny.codec
    torch.manual_seed(0)
    method = ADDConfig(TransformersConfig(dino), weight=0.0, r1=1.0).build(replace(tiny, codec=codec).build())
    for role in method.roles.values():
        role.module.requires_grad_(False)
    for turn in (CRITIC, STUDENT):
        (name,) = turn
        trained = method.roles["critic"].module if turn == CRITIC else method.student.denoiser
        trained.requires_grad_(True)
        method.loss(batch, turn, 0)[0].backward()  # type: ignore[no-untyped-call]
        moved = {n for n, role in method.roles.items() for p in role.module.parameters() if p.grad is not None and p.grad.any()}
        assert moved == {name}
        trained.requires_grad_(False)
        trained.zero_grad()


def test_heads_are_told_the_text_and_as_much_of_the_picture_as_the_student_saw(add: ADD, batch: Batch) -> None:
    critic, told = add.roles["critic"].module, []
    critic.register_forward_hook(lambda module, arguments, output: told.append(arguments))
    _, metrics = add.loss(batch, CRITIC, 0)
    (real, text, image), (fake, *again) = told
    assert torch.equal(again[0], text)
    assert torch.equal(again[1], image)
    assert set(metrics["t"].tolist()) == {1.0, 0.5}
    mean = real[-1].detach().mean(1)
    assert torch.allclose(image, (1 - metrics["t"])[:, None] * mean)
    assert not torch.equal(real[0], fake[0])
    told.clear()
    coupled = replace(batch, latents=torch.zeros(4, 3, 32, 32), images=torch.empty(4, 3, 0, 0))
    add.loss(coupled, CRITIC, 0)
    assert torch.equal(told[0][0][0][0], told[0][0][0][1]), "what the teacher drew is what is real"


def test_blocks_are_read_evenly_with_the_last_among_them(add: ADD) -> None:
    vision, pictures = add.roles["vision"].module, torch.rand(2, 3, 32, 64)
    assert isinstance(vision, Vision)
    with torch.no_grad():
        both, last = features(vision, pictures, 5), features(vision, pictures, 1)
    assert len(both) == 2, "all there are"
    assert torch.equal(last[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert both[0].shape == (2, 1 + 16 * 32, 24), "a wide picture has more patches across"
