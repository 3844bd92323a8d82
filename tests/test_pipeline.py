"""The only sampling path: what a picture depends on, saving and loading."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch

from mezzotint.errors import UserError
from mezzotint.flow.guidance import RULES
from mezzotint.models import DiTConfig
from mezzotint.pipeline import Pipeline, PipelineConfig, find_device, load

PROMPTS = ["a red star above a blue circle", "two green squares", "a ring"]


def test_a_picture_does_not_depend_on_its_neighbours(pipeline: Pipeline) -> None:
    # 1e-5: matrix products of another shape may add in another order.
    together = pipeline(PROMPTS, seed=7)
    for k, prompt in enumerate(PROMPTS):
        assert torch.allclose(pipeline(prompt, seed=7 + k), together[k : k + 1], atol=1e-5)
    several = pipeline(PROMPTS[0], 4, seed=7)
    assert torch.allclose(pipeline(PROMPTS[0], seed=9), several[2:3], atol=1e-5)
    assert not torch.allclose(several[0], several[1], atol=1e-2)


def test_a_picture_does_not_depend_on_the_size_of_the_batches(pipeline: Pipeline) -> None:
    assert torch.allclose(pipeline(PROMPTS, 2, batch=64), pipeline(PROMPTS, 2, batch=4), atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "consistency"])
def test_the_same_settings_give_the_same_bits(pipeline: Pipeline, solver: str) -> None:
    first, second = pipeline(PROMPTS, seed=3, solver=solver), pipeline(PROMPTS, seed=3, solver=solver)
    assert torch.equal(first, second)
    assert first.shape == (3, 3, 32, 32)
    assert first.abs().max() <= 1
    assert not torch.equal(first, pipeline(PROMPTS, seed=4, solver=solver))


def test_prompt_guidance_and_negative_prompt_matter(pipeline: Pipeline) -> None:
    plain = pipeline("a red star", guidance=3.0)
    assert not torch.allclose(plain, pipeline("a blue star", guidance=3.0), atol=1e-3)
    assert not torch.allclose(plain, pipeline("a red star", guidance=1.0), atol=1e-3)
    assert not torch.allclose(plain, pipeline("a red star", guidance=3.0, negative="a blue circle"), atol=1e-3)
    unguided = pipeline("a red star", guidance=1.0)
    assert torch.equal(unguided, pipeline("a red star", guidance=1.0, negative="a blue circle"))


def test_a_rule_of_guidance_is_asked_for_by_name(pipeline: Pipeline) -> None:
    cond, x, t = pipeline.encode(["a red star"]), torch.randn(1, 3, 32, 32), torch.tensor([0.5])
    plain, conditional = pipeline.guided(cond, 4.0)(x, t), pipeline.guided(cond, 1.0)(x, t)
    assert plain.norm() > conditional.norm()
    renormed = pipeline.guided(cond, 4.0, rule="renormed")(x, t)
    assert torch.allclose(renormed, plain * conditional.norm() / plain.norm(), atol=1e-5)
    drawn = [pipeline("a red star", guidance=4.0, rule=rule) for rule in RULES]
    assert not any(torch.equal(one, other) for one, other in combinations(drawn, 2))
    with pytest.raises(UserError, match="unknown rule of guidance 'renorm'; did you mean 'renormed'"):
        pipeline("a red star", rule="renorm")


def test_guidance_in_one_call_equals_two(pipeline: Pipeline) -> None:
    cond = pipeline.encode(PROMPTS)
    x, t = torch.randn(3, 3, 32, 32), torch.full((3,), 0.6)
    with torch.no_grad():
        v_c, v_u = pipeline.velocity(x, t, cond), pipeline.velocity(x, t, cond.null())
        assert torch.allclose(pipeline.guided(cond, 3.0)(x, t), v_u + 3 * (v_c - v_u), atol=1e-4)


def test_the_null_condition_is_the_empty_prompt(pipeline: Pipeline) -> None:
    x, t = torch.randn(1, 3, 32, 32), torch.full((1,), 0.5)
    with torch.no_grad():
        empty, null = pipeline.encode([""]), pipeline.encode(["a red star"]).null()
        assert torch.allclose(pipeline.velocity(x, t, empty), pipeline.velocity(x, t, null), atol=1e-5)


def test_progress_counts_every_step(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(PROMPTS, 2, steps=2, batch=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_dropped_conditions_are_null_and_the_others_stay(pipeline: Pipeline) -> None:
    cond = pipeline.encode(PROMPTS)
    half = pipeline.drop(cond, torch.tensor([False, True, False]))
    null = pipeline.null(cond)
    x, t = torch.randn(3, 3, 32, 32), torch.full((3,), 0.5)
    with torch.no_grad():
        seen, whole, nothing = (pipeline.velocity(x, t, c) for c in (half, cond, null))
    assert torch.allclose(seen[::2], whole[::2], atol=1e-5)
    assert torch.allclose(seen[1], nothing[1], atol=1e-5)
    assert not torch.allclose(whole[1], nothing[1], atol=1e-3)


def test_sampling_leaves_the_mode_alone(pipeline: Pipeline) -> None:
    pipeline.train()
    pipeline("a star")
    assert pipeline.training


def test_wrong_settings_are_named(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match=r"'stepz'.*'steps'"):
        pipeline("a star", stepz=3)
    with pytest.raises(UserError, match=r"'eulr'.*'euler'"):
        pipeline("a star", solver="eulr")
    with pytest.raises(UserError, match="multiple of 8"):
        pipeline("a star", size=30)
    for wrong, message in (
        ({"steps": 0}, "steps of sampling must be at least 1, got 0"),
        ({"guidance": math.nan}, "must be finite, got nan"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline("a star", **wrong)
    with pytest.raises(ValueError, match="must ask for a picture, got 1 prompts and n = 0"):
        pipeline("a star", 0)
    with pytest.raises(ValueError, match="2 seeds for 3 pictures"):
        pipeline(PROMPTS, seed=[1, 2])


def test_a_saved_pipeline_draws_the_same_bits(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "export")
    assert torch.equal(load(tmp_path / "export")(PROMPTS), pipeline(PROMPTS))
    assert torch.equal(load(tmp_path)(PROMPTS), pipeline(PROMPTS)), "the folder of a run holds its export"
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == ["model.safetensors", "pipeline.json"]


def test_half_precision_halves_the_file_and_keeps_the_picture(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "whole")
    pipeline.save(tmp_path / "half", torch.float16)
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    assert torch.allclose(load(tmp_path / "half")(PROMPTS), pipeline(PROMPTS), atol=0.05)


def test_loading_refuses_what_is_no_pipeline(pipeline: Pipeline, tiny: PipelineConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected pipeline\.json"):
        load(tmp_path)
    pipeline.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        load(tmp_path)
    weights.write_bytes(whole)
    data = json.loads((tmp_path / "pipeline.json").read_text())
    for change, message in (({"depth": 3}, "another architecture"), ({"dephts": 3}, "'depth'"), ({"kind": "dut"}, "'dit'")):
        changed = data | {"denoiser": data["denoiser"] | change}
        (tmp_path / "pipeline.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_a_config_comes_back_from_its_data(tiny: PipelineConfig) -> None:
    stored = json.loads(json.dumps(tiny.to_data()))
    assert PipelineConfig.from_data(stored) == tiny
    with pytest.raises(UserError, match="expected a DiTConfig"):
        DiTConfig.from_data(stored)


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="GPU number 0 was asked for, and torch finds 0 here"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="GPU number 2 was asked for, and torch finds 2 here"):
        find_device("auto", 2)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["euler", "heun", "consistency", "unipc"])
def test_all_that_is_drawn_moves_to_the_pipelines_device(solver: str) -> None:
    """The meta device stands for any other: what meets it from the CPU, other than single numbers, is an error."""
    pipe = load("starter").to("meta")
    cond = pipe.encode(["a red star", "two blue circles"])
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    settings = pipe.config.sampling.replace(solver=solver, steps=2)
    assert {step.x.device.type for step in pipe.steps(cond, generators, settings, pipe.null(cond, "a ring"))} == {"meta"}
