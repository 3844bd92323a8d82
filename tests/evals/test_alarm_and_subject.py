"""Whether a run deceives its reward, told from its diary; and what a personalised student remembers."""

import json
from pathlib import Path

import pytest
import torch

from mezzotint import cli
from mezzotint.evals import rewards, subject
from mezzotint.pipeline import Pipeline
from mezzotint.worlds import subject as known
from mezzotint.worlds.caption import parse
from mezzotint.worlds.judge import score
from mezzotint.worlds.render import render
from mezzotint.worlds.scene import is_held_out


def diary(reward: float, held_out: float, steps: int = 40) -> list[dict[str, float]]:
    """A run whose rewards change by so much from its first to its last step, under noise of 0.05."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(2, steps, generator=generator)
    return [
        {
            "step": k + 1,
            "reward": 0.5 + reward * k / steps + float(noise[0, k]),
            "held_out_reward": 0.5 + held_out * k / steps + float(noise[1, k]),
            "kl": k / steps,
        }
        for k in range(steps)
    ]


def test_the_alarm_is_for_a_reward_that_rises_while_the_held_out_one_falls() -> None:
    step = rewards.alarm(diary(0.5, -0.5))
    assert step is not None
    assert 16 <= step <= 30
    for reward, held_out in ((0.5, 0.5), (0.5, 0.0), (0.0, -0.5), (-0.5, -0.5), (0.0, 0.0)):
        assert rewards.alarm(diary(reward, held_out)) is None, (reward, held_out)


def test_what_a_diary_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = diary(0.5, -0.5)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 40, "held_out": 0.1}]))
    assert cli.main(["eval", str(tmp_path), "--suite", "rewards", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == rewards.evaluate(lines)
    assert result["kl"]["first"] == pytest.approx(3.5 / 40)
    assert result["kl"]["last"] == result["kl"]["most"] == pytest.approx(35.5 / 40)
    assert result["reward"]["last"] > result["reward"]["first"] + 0.3
    (tmp_path / "metrics.jsonl").write_text("")
    assert cli.main(["eval", str(tmp_path), "--suite", "rewards"]) == 2
    assert "at least 16 steps, got 0" in capsys.readouterr().err


def test_what_a_report_says_of_rewards() -> None:
    said = rewards.told([*diary(0.5, -0.5), {"step": 40, "held_out": 0.1}])
    assert list(said) == ["reward", "held-out reward", "divergence", "alarm"]
    assert said["divergence"] == "0.0875 to 0.887"
    assert said["alarm"] == f"step {rewards.alarm(diary(0.5, -0.5))}"
    assert rewards.told(diary(0.5, 0.5))["alarm"] == rewards.told(diary(0.5, -0.5)[:3])["alarm"] == "none"
    assert rewards.told([{"loss": 0.1}]) == {}


def test_the_subject_is_what_the_judge_knows_and_training_does_not() -> None:
    scenes = [known.subject(k) for k in range(known.PICTURES)]
    images = render(scenes, 32)
    assert score(images, [known.SHOWS] * len(scenes)).tolist() == [1.0] * len(scenes)
    assert score(images, [known.CLASS] * len(scenes)).tolist() == [1.0] * len(scenes)
    assert all(is_held_out(scene) for scene in scenes)
    assert len(set(scenes)) == known.PICTURES
    with pytest.raises(ValueError, match="not a caption"):
        parse(known.CAPTION)


def test_fidelity_and_forgetting_of_a_student_that_is_known(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    # It draws the subject for the rare word, and for half of the class.
    pictures = render([known.subject(k) for k in range(known.PICTURES)], 32)

    def draws(prompts: list[str], n: int = 1, **settings: object) -> torch.Tensor:
        shown = [p == known.CAPTION or (p == known.CLASS and k % 2 == 0) for k, p in enumerate(prompts)]
        return torch.stack([pictures[k % len(pictures)] if yes else torch.full((3, 32, 32), 0.94) for k, yes in enumerate(shown)])

    monkeypatch.setattr(pipeline, "forward", draws)
    result = subject.evaluate(pipeline, subject.Protocol(pictures=8, prompts=1))
    assert (result["fidelity"], result["drift"], result["class"], result["others"]) == (1.0, 0.5, 0.5, 0.0)
    assert 0.9 < result["likeness"] <= 1.0
    assert result["class_diversity"] > 0
