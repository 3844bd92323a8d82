"""The planner: what a rehearsal counts, by hand and by torch's allocator, and what follows from it."""

import json
import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mezzotint.cli import main
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.dreambooth import DreamBoothConfig
from mezzotint.methods.ladd import LADDConfig
from mezzotint.models import PRESETS
from mezzotint.models.cost import flops
from mezzotint.models.denoiser import blocks
from mezzotint.recipes import RECIPES
from mezzotint.recipes.published import published
from mezzotint.train.advice import advice
from mezzotint.train.devices import DEVICES, Device
from mezzotint.train.plan import CONTEXT, USABLE, Imagined, Rehearsed, Setup, plan, times
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
    """Of three recipes at their smallest size, planned and measured; the last one trains an adapter."""
    configs = {name: RECIPES[name]("xs") for name in ("tiny.worlds", "tiny.dpo", "tiny.lcm_lora")}
    for config in configs.values():
        config.train = config.train.replace(held_out=32, preview_prompts=config.train.preview_prompts[:2])
    return {name: {who: BENCH[who](config) for who in ("planned", "measured")} for name, config in configs.items()}


def test_peaks_are_those_of_the_allocator(peaks: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, found in peaks.items():
        for window in ("train", "eval"):
            assert found["planned"][window] == pytest.approx(found["measured"][window], rel=0.15), (name, window)


def test_a_preference_run_costs_as_much_more_as_planned(peaks: dict[str, dict[str, dict[str, float]]]) -> None:
    planned, measured = (peaks["tiny.dpo"][who]["train"] / peaks["tiny.worlds"][who]["train"] for who in ("planned", "measured"))
    assert measured > 1.2
    assert planned == pytest.approx(measured, rel=0.15)


def test_dit_on_one_a100_takes_as_long_as_published() -> None:
    """fast-DiT's README: DiT-XL/2 at 256 px, cached features, mixed precision, checkpointing, batches of 128: 0.84 steps a second."""
    config, setup = published("dit-xl-2"), Setup(checkpointing=True)
    config.train = config.train.replace(batch=128)
    with Rehearsal() as rehearsal:
        run = Rehearsed(config, Imagined(config), setup, rehearsal)
        run.train(rounds=1)
    compute, sent, update = times(run, config, setup, A100)
    assert sum(sent) == 0
    assert sum(compute) + update == pytest.approx(1 / 0.84, rel=0.2)
    # A forward, its repetition, and two for gradients; a block's repetition need not end.
    forward = 128 * flops(config.pipeline.denoiser, 256, 0)
    assert sum(f for turn in run.turns for f, _ in turn.work) == pytest.approx(4 * forward, rel=0.05)


def test_what_lasts_is_sharded(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    one, four, sixteen = (plan(config, replace(EXACT, gpus=gpus), H100) for gpus in (1, 4, 16))
    for kind in ("weights", "averages", "gradients", "states"):
        assert getattr(one, f"{kind}_gb") == pytest.approx(4 * getattr(four, f"{kind}_gb"))
    assert one.states_gb == pytest.approx(2 * one.weights_gb, rel=1e-3)  # AdamW
    assert one.weights_gb == pytest.approx(4e-9 * one.params)
    assert one.peak_save_gb == pytest.approx(4 * one.weights_gb, rel=1e-3)
    assert (one.images_per_step, sixteen.images_per_step) == (4, 64)
    # Of the weights, gathered forwards and backwards, and of the gradients, scattered, 3/4 and 15/16 are elsewhere.
    with torch.device("meta"):
        denoiser = sum(p.numel() for p in config.pipeline.denoiser.build().parameters())
    assert one.communication_s == 0
    assert four.communication_s == pytest.approx(4 * 0.75 * (2 * denoiser + four.trained) / H100.link)
    assert sixteen.communication_s == pytest.approx(4 * 15 / 16 * (2 * denoiser + four.trained) / H100.network)


def test_accumulated_micro_batches_are_counted(run_config: Callable[..., RunConfig]) -> None:
    one, eight = (plan(run_config(accumulate=accumulate), EXACT, H100) for accumulate in (1, 8))
    assert eight.flops == pytest.approx(8 * one.flops)
    assert eight.images_per_step == 8 * one.images_per_step
    assert one.peak_train_gb < eight.peak_train_gb < one.peak_train_gb + one.gradients_gb  # those of the first are there in the second
    shared = plan(run_config(accumulate=8), replace(EXACT, gpus=8), H100)
    assert shared.images_per_step == eight.images_per_step
    assert shared.flops == pytest.approx(eight.flops)


def test_settings_do_what_they_are_for(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(batch=64)
    plain = plan(config, EXACT, H100)
    recomputed = plan(config, replace(EXACT, checkpointing=True), H100)
    assert recomputed.activations_gb < 0.7 * plain.activations_gb
    assert 1.1 * plain.flops < recomputed.flops < 4 / 3 * plain.flops
    half = plan(config, Setup(), H100)
    assert half.weights_gb == plain.weights_gb
    assert 0.5 * plain.activations_gb < half.activations_gb < plain.activations_gb
    adapter = plan(config, replace(EXACT, lora=4), H100)
    assert adapter.trained < 0.2 * plain.trained
    assert adapter.states_gb < 0.2 * plain.states_gb
    paired = run_config(DPOConfig(), batch=64, pairs=True)
    both, several = (plan(paired, replace(EXACT, lora=rank), H100) for rank in (4, 0))
    assert several.weights_gb + several.averages_gb == pytest.approx(3 * plain.weights_gb)
    assert both.weights_gb + both.averages_gb < 1.3 * plain.weights_gb, "the network is there once"


def test_what_is_drawn_once_is_no_steps_work(run_config: Callable[..., RunConfig]) -> None:
    few, many = (plan(run_config(DreamBoothConfig(class_prompt="a ring", pictures=n)), EXACT, H100) for n in (4, 40))
    assert few.flops == many.flops
    alone = plan(run_config(DreamBoothConfig(prior=0.0)), EXACT, H100).flops
    assert 1.3 * alone < few.flops < 2 * alone, "the words of the class are few"


def test_steps_that_differ_are_planned_by_the_fullest(run_config: Callable[..., RunConfig]) -> None:
    """A critic that learns alone at first, a student at last."""
    alone, never = (plan(run_config(LADDConfig(steps=2, alone=steps)), EXACT, H100) for steps in (1, 0))
    assert alone == never


def test_what_was_asked_before_is_answered_alike(run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages, kernels and their order are those of a rehearsal that remembers nothing; several that end at once may do so in any."""
    found = []
    for _ in range(2):
        config = run_config(batch=2)
        with Rehearsal() as rehearsal:
            run = Rehearsed(config, Imagined(config), Setup(checkpointing=True), rehearsal)
            run.train(rounds=2)
        found.append((rehearsal.work, rehearsal.peak(0, len(rehearsal.steps), {}), sorted(rehearsal.steps)))
        monkeypatch.setattr(Rehearsal, "_answer", lambda self, function, arguments, keywords: function(*arguments, **keywords))
    assert len(found[0][0]) > 100
    assert found[0] == found[1]


def test_what_ranks_that_share_a_sample_send_is_counted(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(batch=2)
    net = config.pipeline.denoiser
    config.pipeline = config.pipeline.replace(denoiser=net.replace(heads=4))
    alone, shared = (
        plan(config.replace(train=config.train.replace(accumulate=4 // n)), replace(EXACT, gpus=4, context=n), H100) for n in (1, 4)
    )
    assert (alone.images_per_step, shared.images_per_step) == (8, 2)
    assert shared.activations_gb < 0.7 * alone.activations_gb  # the text's encoder is not spread
    with Rehearsal() as rehearsal:
        run = Rehearsed(config, Imagined(config), replace(EXACT, context=4), rehearsal)
        run.train(rounds=1)
    # Of B n d: in a block q, k, v and the answer, k and v with the text's; at the end P - 1 shares to each; gradients as much.
    image, words = 16 // 4, math.ceil(run.method.student.encode([run.source.said]).text.shape[1] / 4)
    once = 4 * 2 * net.width * (net.depth * 3 / 4 * (4 * image + 2 * words) + 3 * image)
    exchanged = sum(turn.exchanged for turn in run.turns)
    assert exchanged == pytest.approx(2 * once)
    assert shared.communication_s > exchanged / H100.link


def test_frozen_weights_that_wait_take_no_memory(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(DPOConfig(), pairs=True)
    here, waiting = (plan(config, replace(EXACT, offload=offload), H100) for offload in (False, True))
    reference = 4e-9 * sum(p.numel() for p in config.pipeline.build().parameters())
    assert here.weights_gb - waiting.weights_gb == pytest.approx(reference, rel=1e-3)
    assert waiting.states_gb == here.states_gb
    # The reference is fetched once for every loss: its text encoder and its network.
    assert waiting.communication_s == pytest.approx(reference * 1e9 / H100.host, rel=1e-2)
    assert here.communication_s == 0


def test_states_that_wait_are_those_of_roles_that_do_not_step(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(DMDConfig(critic_turns=3))
    here, waiting = (plan(config, replace(EXACT, offload=offload), H100) for offload in (False, True))
    assert waiting.states_gb == pytest.approx(here.states_gb / 2)
    assert waiting.peak_eval_gb < here.peak_eval_gb
    # Three turns of one role after each other: they leave and come twice in a step, those of one role each time.
    assert waiting.update_s - here.update_s == pytest.approx(2 * here.states_gb * 1e9 / H100.host, rel=1e-2)


def test_autocast_keeps_its_copies_of_weights_through_a_forward() -> None:
    """Where blocks are computed again for their gradients, nothing else would keep them."""
    with Rehearsal() as seen:
        net = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False, device="meta") for _ in range(5)))
        x = torch.empty(1, 64, device="meta", requires_grad=True)
        before = seen.now
        with seen.autocast():
            for layer in net:
                x = checkpoint(layer, x, use_reentrant=False)
            assert seen.now - before >= 5 * 64 * 64 * 2
            copies = seen.now
        assert copies - seen.now == 5 * 64 * 64 * 2
        with torch.no_grad(), seen.autocast():
            before = seen.now
            net(x)
            assert seen.now - before < 64 * 64 * 2


def device(gigabytes: float) -> Device:
    """One that can hold so much."""
    return replace(H100, memory=(gigabytes * 1e9 + CONTEXT) / USABLE)


def test_the_cheapest_change_comes_first(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(batch=64)
    config.pipeline = replace(config.pipeline, sampling=config.pipeline.sampling.replace(batch=4))
    plain = plan(config, EXACT, H100)
    recomputed = plan(config, replace(EXACT, checkpointing=True), H100)
    assert advice(config, EXACT, device(plain.peak_train_gb)) == []

    first = advice(config, EXACT, device(recomputed.peak_train_gb * 1.001))
    assert [change.words for change in first] == ["--checkpointing"]
    assert first[0].plan.fits

    second = advice(config, EXACT, device(recomputed.peak_train_gb * 0.95))
    assert [change.words for change in second] == ["--train.batch 32 --train.accumulate 2"]
    assert second[0].plan.images_per_step == plain.images_per_step


def test_changes_are_made_on_top_of_each_other(run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.train.advice.MOST_GPUS", 2)
    config = run_config(batch=2, held_out=2)
    config.pipeline = replace(config.pipeline, sampling=config.pipeline.sampling.replace(batch=1))
    hopeless = advice(config, EXACT, device(1e-6))
    assert [change.words.split()[0] for change in hopeless] == [
        "--train.held-out",
        "--checkpointing",
        "--train.batch",
        "--gpus",
        "--lora",
        "--optim.name",
    ]
    assert not hopeless[-1].plan.fits
    assert hopeless[-1].run[1] == Setup(gpus=2, precision="float32", checkpointing=True, lora=16)
    assert hopeless[-1].run[0].optim.name == "adamw8"
    assert hopeless[-1].plan.peak_train_gb < hopeless[0].plan.peak_train_gb


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "tiny.worlds", "--size", "xs", "--gpu", "a100", "--gpus", "2", "--price", "10", "--train.held-out", "4"]
    assert main([*words, "--train.steps", "1000", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {"params", "peak_train_gb", "peak_eval_gb", "peak_save_gb", "step_s", "days", "cost"} <= made.keys()
    assert made["days"] == pytest.approx(1000 * made["step_s"] / 86_400)
    assert made["cost"] == pytest.approx(made["days"] * 24 * 2 * 10)
    assert made["changes"] == made["stages"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flux-de"], "unknown recipe 'flux-de'; did you mean 'flux-dev'?"),
        (["tiny.worlds", "--gpu", "h10"], "unknown gpu 'h10'; did you mean 'h100'?"),
        (["tiny.worlds", "--gpus", "0"], "--gpus must be a whole number of at least 1, got '0'"),
        (["tiny.worlds", "--gpus", "4", "--context", "3"], "--context must divide --gpus (4), got 3"),
        (["tiny.worlds", "--method", "dop"], "unknown method 'dop'; did you mean 'dpo'?"),
        (["tiny.worlds", "--train.bacth", "4"], "unknown field of tiny.worlds 'train.bacth'; did you mean 'train.batch'?"),
        (["tiny.worlds", "--size", "xs", "--method", "dpo"], "DPO needs preference pairs"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().count("\n") == 0
