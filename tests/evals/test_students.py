"""A student beside its teacher."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mezzotint.data.worlds import WorldsConfig
from mezzotint.evals.students import Protocol, evaluate, fine_power, path_straightness
from mezzotint.pipeline import Pipeline

PROTOCOL = Protocol(prompts=1, pictures=2, calls=(2,), solver="heun", reference=2)


def test_a_student_that_is_its_teacher_is_at_no_distance(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.config = replace(pipeline.config, sampling=pipeline.config.sampling.replace(solver="heun", steps=2, guidance=1.5))
    result = evaluate(pipeline, pipeline, PROTOCOL, pictures=tmp_path / "rows.png")
    assert json.loads(json.dumps(result))["suite"] == "students"
    assert list(result["calls"]) == ["2"]
    assert result["rows"] == ["teacher", "reference", "student 2", "teacher 2"]
    with Image.open(tmp_path / "rows.png") as shown:  # six prompts, four rows
        height, width = shown.height // 4, shown.width
        rows = [shown.crop((0, row * height, width, (row + 1) * height)).tobytes() for row in range(4)]
    assert len(set(rows)) == 1, "all of them are one sampler here"
    assert len(set(rows[0])) > 1
    for row in (result["calls"]["2"]["student"], result["calls"]["2"]["teacher"], result["teacher"]):
        assert row == result["reference"]
    assert result["reference"]["distance"] == 0
    assert result["reference"]["detail"] == 1
    assert result["straightness"]["student"] == result["straightness"]["teacher"] > 0


def test_another_student_is_at_a_distance(pipeline: Pipeline) -> None:
    result = evaluate(pipeline, pipeline, replace(PROTOCOL, reference=3))
    assert result["calls"]["2"]["teacher"]["distance"] > 1e-4
    assert result["calls"]["2"]["student"] != result["calls"]["2"]["teacher"], "euler for heun"


def test_blur_takes_detail_away() -> None:
    images = WorldsConfig().build().batch(0, 4).images
    blurred = F.avg_pool2d(F.pad(images, [1] * 4, mode="reflect"), 3, stride=1)
    assert fine_power(blurred) < 0.5 * fine_power(images)
    assert fine_power(0.5 * images) == pytest.approx(0.25 * fine_power(images), rel=1e-5)


def test_a_flow_to_one_picture_is_straight(pipeline: Pipeline) -> None:
    bent = path_straightness(pipeline, ["a", "b"], pipeline.config.sampling, seed=0)
    pipeline.velocity = lambda x, t, cond: (x - 0.3) / t[:, None, None, None]  # type: ignore[method-assign, assignment]
    straight = path_straightness(pipeline, ["a", "b"], pipeline.config.sampling.replace(batch=1), seed=0)
    assert straight < 1e-9 < bent
    assert torch.isfinite(torch.tensor(bent))
