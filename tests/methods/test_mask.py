"""Patches that are left out of training: which, what the network makes of the others, what the loss is, and what it saves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.flow.path import interpolate
from mezzotint.methods import denoise
from mezzotint.methods.denoise import DenoiseConfig, kept, patches, roughness
from mezzotint.methods.repa import OwnConfig, REPAConfig
from mezzotint.models import ClassDiTConfig, Cond, DiTConfig, dit
from mezzotint.models.cost import flops, masked_flops
from mezzotint.pipeline import Pipeline, PipelineConfig
from mezzotint.train.speed import Operations

DIT = DiTConfig(width=32, depth=3, heads=2, patch=4, text_width=16)
CLASSES = ClassDiTConfig(width=32, depth=3, heads=2, patch=4, channels=3, classes=4)
CONFIGS = {"dit": DIT, "class_dit": CLASSES, "in_context": CLASSES.replace(variant="in_context")}
KEEP = torch.tensor([[0, 5, 6, 11], [1, 3, 4, 15]])


def filled(config: Any) -> torch.nn.Module:
    """A network without zero layers."""
    torch.manual_seed(0)
    net: torch.nn.Module = config.build()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, Cond]:
    torch.manual_seed(seed)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return torch.randn(2, 3, 16, 16), torch.rand(2), Cond(torch.randn(2, 3, 16), mask, torch.randn(2, 16), label=torch.tensor([2, -1]))


def outside(keep: Tensor, patch: int = 4, side: int = 16) -> Tensor:
    """(B, 1, side, side) True where a pixel is in no kept patch."""
    rows = torch.zeros(len(keep), (side // patch) ** 2, dtype=torch.bool).scatter(1, keep, True).unflatten(1, (side // patch, -1))
    return ~rows.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("mixer", [0, 2])
def test_all_patches_in_any_order_are_the_whole_picture(config: Any, mixer: int) -> None:
    net, (x, t, cond) = filled(config.replace(mixer=mixer)), inputs()
    whole = filled(config)(x, t, cond)
    assert torch.equal(net(x, t, cond), whole), "without effect where nothing is left out"
    in_order = torch.arange(16).expand(2, -1)
    assert torch.equal(net(x, t, replace(cond, keep=in_order)), whole)
    # Positions go with the tokens, and tokens back to their places.
    mixed = torch.stack([torch.randperm(16), torch.randperm(16)])
    assert torch.allclose(net(x, t, replace(cond, keep=mixed)), whole, atol=1e-5)


def test_kept_patches_are_what_they_are_where_the_others_are_not_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, t, cond) = filled(DIT), inputs()
    out = net(x, t, replace(cond, keep=KEEP))
    seen = torch.zeros(2, 16, dtype=torch.bool).scatter(1, KEEP, True)
    monkeypatch.setattr(dit, "with_image", lambda mask, image: torch.cat([mask, seen], dim=1))
    assert torch.allclose(patches(out, KEEP, 4), patches(net(x, t, cond), KEEP, 4), atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_only_the_mixer_sees_what_is_left_out(config: Any) -> None:
    gone = outside(KEEP).expand(2, 3, 16, 16)
    for mixer in (0, 1):
        net, (x, t, cond) = filled(config.replace(mixer=mixer)), inputs()
        x.requires_grad_()
        out = net(x, t, replace(cond, keep=KEEP))
        assert not out[gone].any()
        assert out[~gone].all()
        out.square().sum().backward()
        assert x.grad is not None
        assert x.grad[~gone].all()
        assert x.grad[gone].any() == (mixer == 1)


@pytest.fixture
def masked(tiny: PipelineConfig) -> Pipeline:
    """A pipeline of pictures of 16 patches."""
    torch.manual_seed(0)
    pipeline = replace(tiny, denoiser=replace(tiny.denoiser, patch=8, mixer=1)).build()
    for p in pipeline.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return pipeline


@pytest.mark.parametrize("detail", [0.0, 1.5])
def test_the_loss_is_the_mean_over_kept_patches(detail: float, masked: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seen = WorldsConfig().build().batch(0, 3), dict[str, Any]()
    velocity = masked.velocity

    def watch(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.update(x=x, t=t, cond=cond, v=velocity(x, t, cond))
        return seen["v"]

    def noised(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        seen.update(target=eps - x0)
        return interpolate(x0, eps, t)

    monkeypatch.setattr(masked, "velocity", watch)
    monkeypatch.setattr(denoise, "interpolate", noised)
    loss, metrics = DenoiseConfig(mask=0.75, detail=detail).build(masked).loss(batch, ("student",), 0)
    keep = seen["cond"].keep
    assert keep.shape == (3, 4)
    errors, losses = [], []
    for row in range(3):
        cut = [
            (seen["v"] - seen["target"])[row, :, 8 * (n // 4) : 8 * (n // 4) + 8, 8 * (n % 4) : 8 * (n % 4) + 8] for n in keep[row].tolist()
        ]
        errors.append(torch.stack([part.square().mean() for part in cut]).mean())
        losses.append(errors[-1] + detail * roughness(torch.stack(cut)).mean())
    assert torch.allclose(metrics["loss"], torch.stack(errors))
    assert torch.allclose(loss, torch.stack(losses).mean())


def test_nothing_more_is_drawn_where_nothing_is_left_out(masked: Pipeline) -> None:
    batch, states = WorldsConfig().build().batch(0, 3), []
    for mask in (0.0, 0.5):
        torch.manual_seed(0)
        DenoiseConfig(mask=mask).build(masked).loss(batch, ("student",), 0)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    torch.rand(3), DenoiseConfig().times.sample(3), torch.randn(3, 3, 32, 32)
    assert torch.equal(states[0], torch.get_rng_state())
    assert not torch.equal(states[1], states[0])


def test_patches_are_kept_evenly_and_at_least_one() -> None:
    torch.manual_seed(0)
    keep = kept(0.75, 2000, 16)
    assert keep.shape == (2000, 4)
    assert (keep.diff(dim=1) > 0).all()
    assert (torch.bincount(keep.flatten(), minlength=16) - 500).abs().max() < 100  # five deviations
    assert kept(0.99, 2, 16).shape == (2, 1)
    assert torch.equal(kept(0.0, 2, 5), torch.arange(5).expand(2, -1))
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"mask must be within \[0, 1\)"):
            kept(share, 2, 16)


@pytest.mark.parametrize("config", [DIT, CLASSES], ids=["dit", "class_dit"])
def test_work_goes_down_with_the_patches(config: Any) -> None:
    config = config.replace(width=512, depth=8, heads=8, patch=2, mixer=2)
    with torch.device("meta"):
        net, x, t = config.build(), torch.randn(1, 3, 64, 64), torch.rand(1)
        keep = torch.zeros(1, 256, dtype=torch.int64)
        cond = Cond(torch.randn(1, 16, 16), None, torch.randn(1, 16), label=torch.zeros(1, dtype=torch.int64), keep=keep)
    operations = Operations()
    operations.watch(net, config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, t, cond)
    expected = masked_flops(config, 1024, 16, 256)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    assert operations.total == expected
    whole = flops(config, 1024, 16)
    assert (2 / 8 + 6 / 8 * 0.2) * whole < expected < (2 / 8 + 6 / 8 * 0.26) * whole


def refused(pipeline: Pipeline) -> Callable[[], object]:
    batch = Batch(torch.zeros(1, 3, 32, 32), [""], ["x"])
    return lambda: DenoiseConfig(mask=0.5).build(pipeline).loss(batch, ("student",), 0)


def test_what_cannot_leave_patches_out_is_refused_in_a_line(tiny: PipelineConfig, masked: Pipeline) -> None:
    overlapping = replace(tiny, denoiser=replace(tiny.denoiser, patch=16, stride=8)).build()
    with pytest.raises(UserError, match=r"without overlap \(its stride 0\), and this is a dit") as error:
        refused(overlapping)()
    assert "\n" not in str(error.value)
    refused(masked)()
    with pytest.raises(ValueError, match=r"flow.mask must be 0"):
        REPAConfig(DenoiseConfig(mask=0.5), OwnConfig()).build(masked)
    for config in (DIT, CLASSES):
        with pytest.raises(ValueError, match=r"mixer must be within \[0, 2\]"):
            config.replace(mixer=3).build()  # type: ignore[attr-defined]
