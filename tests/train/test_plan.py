"""The planner: what a rehearsal counts, by hand and by torch's allocator, and what follows from it."""


import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mezzotint.cli import main
from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.models import PRESETS
from mezzotint.recipes import RECIPES
from mezzotint.recipes.published import published
from mezzotint.train.advice import advice
from mezzotint.train.devices import DEVICES
from mezzotint.train.plan import EIGHT_BIT, Plan, Setup, blocks, kernel_seconds, plan
from mezzotint.train.rehearsal import Rehearsal
from mezzotint.train.trainer import RunConfig

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "plan.py"))
A100, H100 = DEVICES["a100"], DEVICES["h100"]
EXACT = Setup(precision="float32")


def test_bytes_and_operations_are_those_of_the_arithmetic() -> None:
    with Rehearsal() as seen:
        layer = nn.Linear(30, 50, bias=False, device="meta")
        x = torch.empty(20, 30, device="meta")
        weight = seen.number(layer.weight)
        before = seen.now
        y = layer(x)
        assert seen.now - before == 4 * 20 * 50
        y.view(50, 20)[3:]  # a view is no storage
        assert seen.now - before == 4 * 20 * 50
        loss = y.square().sum()
        loss.backward()
        gradient = seen.number(layer.weight.grad)  # type: ignore[arg-type]
        del y, loss, x
    product = 2 * 20 * 30 * 50
    assert sum(flops for flops, _ in seen.work) == 2 * product  # x needs no gradient
    assert max(seen.work) == (product, 4 * (20 * 30 + 30 * 50 + 20 * 50))
    assert seen.now == 4 * 2 * 30 * 50
    assert seen.held({weight: 1.0, gradient: 0.5}) == 4 * 30 * 50 * 1.5
    whole = seen.peak(0, len(seen.steps), {})
    assert seen.peak(0, len(seen.steps), {weight: 3.0}) == whole + 2 * 4 * 30 * 50


def test_attention_is_a_fused_kernel() -> None:
    """Two products forward and five backward; what is kept grows with the tokens and not with their square."""
    held = []
    for tokens in (512, 1024):
        with Rehearsal() as seen:
            q, k, v = (torch.empty(1, 2, tokens, 8, device="meta", requires_grad=True) for _ in range(3))
            answer = F.scaled_dot_product_attention(q, k, v)
            held.append(seen.now)
            assert sum(flops for flops, _ in seen.work) == 2 * 2 * 2 * tokens**2 * 8
            answer.sum().backward()
            assert sum(flops for flops, _ in seen.work) == 7 * 2 * 2 * tokens**2 * 8
    assert held[1] == 2 * held[0]


def test_small_numbers_stay_and_large_ones_are_not_made() -> None:
    with Rehearsal():
        t = torch.rand(4)
        assert t.device.type == "cpu"
        assert 0 <= t[0].item() <= 1
        assert (t[:, None] * torch.empty(4, 3, device="meta")).device.type == "meta"
        assert torch.randn(1 << 20, generator=torch.Generator()).device.type == "meta"
        assert bool(torch.empty(3, device="meta").isfinite().all())
    assert torch.empty(1 << 20).device.type == "cpu"
    assert F.scaled_dot_product_attention.__module__ != Rehearsal.__module__


@pytest.mark.parametrize("name", ["dit-s-2", "flux-dev", "sd1.5", "uvit-s-2"])
def test_blocks_are_found(name: str) -> None:
    """Almost all weights are in blocks, and a block is a small part of them."""
    with torch.device("meta"):
        config: Any = PRESETS[name]()
        net = config.replace(joint=2, single=4).build() if name == "flux-dev" else config.build()
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(net)]
    assert sum(sizes) > 0.85 * sum(p.numel() for p in net.parameters())
    assert max(sizes) < 0.4 * sum(sizes)


@pytest.fixture(scope="module")
def peaks() -> dict[str, dict[str, dict[str, float]]]:
    """Of two recipes at their smallest size, planned and measured."""
    configs = {name: RECIPES[name]("xs") for name in ("tiny.worlds", "tiny.dpo")}
    for config in configs.values():
        config.train.held_out = 64
    return {name: {who: BENCH[who](config) for who in ("planned", "measured")} for name, config in configs.items()}


def test_peaks_are_those_of_the_allocator(peaks: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, found in peaks.items():
        for window in ("train", "eval"):
            assert found["planned"][window] == pytest.approx(found["measured"][window], rel=0.15), (name, window)


def test_a_preference_run_costs_as_much_more_as_planned(peaks: dict[str, dict[str, dict[str, float]]]) -> None:
    planned, measured = (peaks["tiny.dpo"][who]["train"] / peaks["tiny.worlds"][who]["train"] for who in ("planned", "measured"))
    assert measured > 1.2
    assert planned == pytest.approx(measured, rel=0.15)


def test_dit_on_one_a100_is_as_published() -> None:
    """fast-DiT's README: DiT-XL/2 at 256 px, cached features, mixed precision, checkpointing, batches of 128: 0.84 steps a second."""
    config = published("dit-xl-2")
    config.train = config.train.replace(batch=128)
    made = plan(config, Setup(checkpointing=True), A100)
    assert made.params == pytest.approx(674_834_720)
    assert made.step_s == pytest.approx(1 / 0.84, rel=0.2)


def sharded(config: RunConfig, gpus: int) -> Plan:
    return plan(config, replace(EXACT, gpus=gpus), H100)


def test_what_lasts_is_sharded(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    one, four, sixteen = (sharded(config, gpus) for gpus in (1, 4, 16))
    for kind in ("weights", "averages", "gradients", "states"):
        assert getattr(one, f"{kind}_gb") == pytest.approx(4 * getattr(four, f"{kind}_gb"))
    assert one.states_gb == pytest.approx(2 * one.weights_gb, rel=1e-3)  # AdamW
    assert one.weights_gb == pytest.approx(4e-9 * one.params)
    assert one.communication_s == 0
    # Weights are gathered for the forward and the backward pass, and gradients scattered: 3/4 of them are elsewhere.
    denoiser, text = 4 * _denoiser(config), 0
    assert four.communication_s == pytest.approx(0.75 * 3 * denoiser / H100.link, rel=0.2)
    assert sixteen.communication_s > 5 * four.communication_s  # over the network
    assert (one.images_per_step, sixteen.images_per_step) == (4, 64)
    assert text == 0


def _denoiser(config: RunConfig) -> int:
    return sum(p.numel() for p in config.pipeline.denoiser.build().parameters())
