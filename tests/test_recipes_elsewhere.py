"""Recipes on other models and other data than those that they are written for."""

from dataclasses import replace

import pytest

from mezzotint.data.folder import FolderConfig
from mezzotint.methods.lcm import LCMConfig
from mezzotint.recipes import RECIPES
from mezzotint.recipes.other import on_own, started
from mezzotint.recipes.tiny import worlds


@pytest.mark.parametrize(("guidance", "of_teacher", "told"), [(7.0, 7.0, (1.0, 14.0)), (1.0, 1.0, (1.0, 2.0))])
def test_a_teacher_is_guided_as_its_model_is_drawn(guidance: float, of_teacher: float, told: tuple[float, float]) -> None:
    start = worlds().pipeline
    start = replace(start, sampling=start.sampling.replace(guidance=guidance, size=64))
    distilled = started(RECIPES["tiny.scm"](), start, "s")
    assert vars(distilled.method)["guidance"] == of_teacher
    assert distilled.pipeline.sampling.guidance == 1, "the student has the guidance in it"
    assert distilled.data.size == 64
    lcm = started(RECIPES["tiny.lcm"](), start, "s")
    assert isinstance(lcm.method, LCMConfig)
    assert lcm.method.scales == told
    assert lcm.pipeline.sampling.guidance == guidance


def test_what_judges_worlds_judges_nobodys_pictures() -> None:
    student = on_own(RECIPES["tiny.consistency"](), FolderConfig("pictures"))
    assert (student.evaluation.suite, student.evaluation.best, student.evaluation.patience) == ("students", "", 0)
    assert on_own(RECIPES["tiny.dreambooth"](), FolderConfig("pictures")).evaluation.suite == ""
    assert on_own(RECIPES["tiny.sft"](), FolderConfig("pictures")).evaluation.best == "held_out"
