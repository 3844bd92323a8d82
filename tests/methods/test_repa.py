"""REPA: what the loss is, where its gradient goes, and that features and tokens of one place meet."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.repa import REPA, OwnConfig, REPAConfig, Tap, TransformersConfig, resized
from mezzotint.models.unet import UNetConfig
from mezzotint.pipeline import Pipeline, PipelineConfig, load
from mezzotint.train.log import read
from mezzotint.train.trainer import RunConfig, Trainer

BOTH = ("student", "projector")


@pytest.fixture
def repa(dino: str, pipeline: Pipeline) -> REPA:
    return REPAConfig(vision=TransformersConfig(dino), layer=1, hidden=16).build(pipeline)


def seeded(method: Any, step: int = 0, turn: tuple[str, ...] = BOTH) -> tuple[Tensor, Any]:
    batch = WorldsConfig().build().batch(0, 4)
    torch.manual_seed(0)
    out: tuple[Tensor, Any] = method.loss(batch, turn, step)
    return out


def test_the_loss_is_that_of_the_flow_and_the_likeness(repa: REPA, pipeline: Pipeline) -> None:
    loss, metrics = seeded(repa)
    flow, _ = seeded(DenoiseConfig().build(pipeline))
    assert torch.allclose(loss, flow - 0.5 * metrics["likeness"].mean())
    assert metrics["likeness"].shape == (4,)

    class Same(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            images = WorldsConfig().build().batch(0, 4).images
            target: Tensor = repa.roles["vision"].module(images, (4, 4)).flatten(2).mT
            return 3 * target

    repa.roles["projector"].module = Same()
    assert torch.allclose(seeded(repa)[0], flow - 0.5)


def test_the_alignment_teaches_the_blocks_before_it_and_the_projector(repa: REPA) -> None:
    _, metrics = seeded(repa)
    assert not metrics["likeness"].requires_grad
    repa.student.zero_grad()
    plain, _ = seeded(repa.flow)
    loss, _ = seeded(repa)
    (loss - plain).backward()  # the same random numbers: what is left is the alignment
    blocks: Any = repa.student.denoiser.blocks

    def moved(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and float(p.grad.abs().max()) > 1e-6 for p in module.parameters())

    assert moved(blocks[0])
    assert moved(repa.roles["projector"].module)
    assert not moved(blocks[1])
    assert not moved(repa.student.denoiser.head)  # type: ignore[arg-type]
    assert not moved(repa.roles["vision"].module)


def test_after_stop_it_is_the_flow_alone(dino: str, pipeline: Pipeline) -> None:
    method = REPAConfig(vision=TransformersConfig(dino), layer=1, stop=3).build(pipeline)
    assert [list(method.turns(step)) for step in (0, 2, 3)] == [[BOTH], [BOTH], [("student",)]]
    loss, metrics = seeded(method, step=3, turn=("student",))
    flow, _ = seeded(DenoiseConfig().build(pipeline))
    assert torch.equal(loss, flow)
    assert "likeness" not in metrics


def test_features_are_the_normalised_patches_of_the_encoder(repa: REPA) -> None:
    vision = repa.roles["vision"].module
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        seen = ((images + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
        tokens = vision.model(seen).last_hidden_state  # type: ignore[union-attr, operator]
        features = vision(images, (16, 16))  # type: ignore[operator]
    assert tokens.shape == (2, 257, 24)
    assert torch.allclose(features.flatten(2).mT, tokens[:, 1:], atol=1e-5)
    assert torch.allclose(vision(images, (4, 4)), torch.nn.functional.interpolate(features, (4, 4), mode="bilinear", antialias=True))  # type: ignore[operator]


def test_patches_meet_tokens_of_their_place(pipeline: Pipeline) -> None:
    """What lies in one corner moves the tokens of that corner most, in the tap as on the encoder's grid."""
    x = torch.zeros(1, 3, 32, 32)
    poked = x.clone()
    poked[:, :, :8, 24:] = 1.0  # first row, last column of a grid of 4 x 4
    found = []
    for images in (x, poked):
        with Tap(pipeline, 1, images) as tap, torch.no_grad():
            pipeline.velocity(images, torch.zeros(1), pipeline.encode([""]))
        found.append(tap.tokens())
    assert int((found[1] - found[0]).norm(dim=-1).argmax()) == 3
    grid = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(resized(grid, (4, 4)), grid)
    assert torch.allclose(resized(grid, (2, 2)).mean(), grid.mean())


def test_own_networks_are_encoders(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "own")
    vision = OwnConfig(str(tmp_path / "own"), layer=2).build()
    images = WorldsConfig().build().batch(0, 2).images
    with torch.no_grad():
        features = vision(images, (4, 4))
        assert features.shape == (2, 32, 4, 4)
        assert torch.equal(vision(images, (4, 4)), features)
    assert not any(p.requires_grad for p in vision.parameters())


def test_a_layer_that_is_not_there_is_refused(dino: str, pipeline: Pipeline, tiny: PipelineConfig) -> None:
    vision = TransformersConfig(dino)
    with pytest.raises(ValueError, match=r"layer must be within \[1, 2\], got 3"):
        REPAConfig(vision=vision, layer=3).build(pipeline)
    maps = replace(tiny, denoiser=UNetConfig(widths=(32, 32), depths=(1, 0), heads=(2, 2), groups=8, channels=3, text_width=32))
    with pytest.raises(ValueError, match="layer must be a block over tokens, and a unet has maps"):
        REPAConfig(vision=vision, layer=1).build(maps.build())
    with pytest.raises(UserError, match=r"cannot read a vision encoder from \./nowhere"):
        TransformersConfig("./nowhere").build()


def test_a_run_aligns_and_exports_the_student_alone(run_config: Callable[..., RunConfig], dino: str, tmp_path: Path) -> None:
    method = REPAConfig(vision=TransformersConfig(dino), layer=1, hidden=16, weight=5.0)
    config = run_config(method, steps=12, checkpoint=12, preview=12, evaluate=12)
    config.optim.lr = 1e-2
    Trainer(config, tmp_path).run()
    likeness = [line["student+projector.likeness"] for line in read(tmp_path / "metrics.jsonl") if "lr" in line]
    assert likeness[-1] > likeness[0] + 0.2
    names = load(tmp_path).state_dict()
    assert not any(name.startswith(("projector", "vision", "model")) for name in names)
