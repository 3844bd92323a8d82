"""The lifecycle at a size of seconds: six stages, stopped in the fourth, gone on with, ending in a report; and what is refused."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from mezzotint import chain, lifecycle
from mezzotint.cli import main
from mezzotint.errors import UserError
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.flow_grpo import FlowGRPOConfig
from mezzotint.pipeline import load
from mezzotint.recipes import tiny
from mezzotint.rewards import LearnedConfig, PreferenceConfig, TotalConfig
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import Trainer

STAGES = ["pretrain", "sft", "reward", "grpo", "distil", "subject"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which the whole chain takes seconds."""
    monkeypatch.setitem(tiny.SIZES, "xs", tiny.Size(width=64, depth=1, text=64, image=24, batch=2, steps=4, lr=1e-3))
    monkeypatch.setitem(chain.PROMPTS_PER_TASK, "xs", 1)
    monkeypatch.setattr(lifecycle, "PROMPTS", lifecycle.PROMPTS[-2:])
    real = lifecycle.parts

    def smaller(folder: Path, size: tiny.SizeName, tune: lifecycle.Tune) -> list[chain.Part]:
        parts = real(folder, size, tune)
        for part in parts:
            config, last = part.config, 3
            config.train = config.train.replace(steps=last, log=1, evaluate=last, preview=last, held_out=4, preview_prompts=())
            config.pipeline.sampling = config.pipeline.sampling.replace(steps=4)
            if isinstance(config.method, FlowGRPOConfig):
                config.method = config.method.replace(group=4, steps=3, window=2)
        return parts

    monkeypatch.setattr(lifecycle, "parts", smaller)


def stopping(at: str, real: Callable[[Trainer], object]) -> Callable[[Trainer], object]:
    """Training that is stopped by hand in a stage."""

    def step(self: Trainer) -> object:
        if self.folder.name == at:
            raise Stopped("stopped at step 0")
        return real(self)

    return step


def test_it_runs_stops_goes_on_and_reports(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["lifecycle", "--size", "xs", "--out", str(run), "--tune", "grpo"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopping("grpo", Trainer._train_step))
        assert main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    before = {name: (run / name / "export" / "model.safetensors").stat().st_mtime_ns for name in STAGES[:3]}
    assert main(words) == 0
    assert before == {name: (run / name / "export" / "model.safetensors").stat().st_mtime_ns for name in STAGES[:3]}
    assert "mezzotint sample 'a zzz ring'" in capsys.readouterr().out

    page = (run / "report.html").read_text()
    for part in lifecycle.parts(run, "xs", "grpo"):
        assert f"{part.title} <code>{part.folder.name}</code>" in page
    for column in ("judge", "preference", "diversity", "held-out pairs right", "subject fidelity", "drift of its class", "other prompts"):
        assert f">{column}</th>" in page, column
    assert page.count("<svg viewBox") == len(STAGES), "a curve for every stage"
    assert page.count("<img") == (len(STAGES) - 1) * len(lifecycle.PROMPTS), "the reward model draws nothing"
    assert "<dt>reward</dt>" in page
    assert "<dt>alarm</dt>" in page

    weights = {name: load_file(run / name / "export" / "model.safetensors") for name in STAGES}
    same = {(a, b) for a, b in pairwise(STAGES) if all(torch.equal(x, weights[b][n]) for n, x in weights[a].items())}
    assert same == {("sft", "reward")}, "every stage changes the pipeline, but for the reward model's"
    assert (run / "subject" / "export" / "adapter").is_dir()
    assert load(run / "subject").config.sampling == load(run / "distil").config.sampling
    assert load(run / "subject").config.sampling.steps == 4
    gained = [json.loads((run / name / "evaluation-subject.json").read_text()) for name in ("distil", "subject")]
    assert all({"fidelity", "drift", "others"} <= result.keys() for result in gained)
    assert main([*words[:-1], "dpo"]) == 2, "the later stages there are of another chain"
    assert "other settings" in capsys.readouterr().err


def test_the_stages_fit_together(tmp_path: Path) -> None:
    for tune in lifecycle.TUNES:
        parts = {part.folder.name: part for part in lifecycle.parts(tmp_path, "s", tune)}  # type: ignore[arg-type]
        starts = [part.start for part in parts.values()]
        assert starts == ["", "pretrain", "sft", "sft", tune, "distil"]
        assert [part.config.init for part in parts.values()][1:] == [str(tmp_path / name / "export") for name in starts[1:]]
        method = parts[tune].config.method
        assert isinstance(method, FlowGRPOConfig | DPOConfig)
        assert isinstance(method.goal.reward, TotalConfig)
        assert method.goal.reward.parts[1].reward == LearnedConfig(str(tmp_path / "reward"))
        assert isinstance(method.goal.held_out, PreferenceConfig), "what is watched is not what is raised"


def test_a_chain_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mezzotint\[lora\]"):
        lifecycle.lifecycle(tmp_path / "run", "xs", "grpo", Progress())
    assert not (tmp_path / "run").exists()
