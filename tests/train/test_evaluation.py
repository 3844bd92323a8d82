"""Evaluation while training: what is best is kept, enough is enough, memory is given back, and what is written says so."""

import base64
import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mezzotint.cli import main
from mezzotint.errors import UserError
from mezzotint.evals import students, worlds
from mezzotint.methods.dmd import DMDConfig
from mezzotint.pictures import png_bytes
from mezzotint.pipeline import Pipeline, load
from mezzotint.train import chores, track
from mezzotint.train.evaluation import SEED, Best, EvaluationConfig
from mezzotint.train.heldout import heldout_loss
from mezzotint.train.log import BINS, LossByTime, read
from mezzotint.train.parallel import ParallelConfig
from mezzotint.train.speed import Operations, matmul_rate
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer

Make = Callable[..., RunConfig]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Held-out losses to come, in place of those of the network."""
    coming: list[float] = []
    monkeypatch.setattr(chores, "heldout_loss", lambda *arguments: torch.full((8,), coming.pop(0)))
    return coming


def quick(make: Make, **evaluation: Any) -> RunConfig:
    """A run of eight steps that is evaluated after each."""
    config = make(steps=8, evaluate=1, log=8, checkpoint=4, preview=8, preview_prompts=())
    return replace(config, evaluation=EvaluationConfig(**evaluation))


def test_the_best_weights_are_kept(run_config: Make, losses: list[float], tmp_path: Path) -> None:
    losses += [0.9, 0.5, math.nan, 0.7, 0.5, 0.6, 0.8, 0.9]
    Trainer(quick(run_config), tmp_path / "run").run()
    best = json.loads((tmp_path / "run" / "export-best" / "best.json").read_text())
    assert best == {"measure": "held_out", "value": 0.5, "step": 2}
    kept = load(tmp_path / "run" / "export-best").state_dict()
    last = load(tmp_path / "run").state_dict()
    assert not all(torch.equal(kept[name], last[name]) for name in kept)


def test_a_disk_that_is_full_is_told(run_config: Make, losses: list[float], tmp_path: Path) -> None:
    losses += [0.9] * 8
    (tmp_path / "export-best").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write .*export-best: .*free some space and run the same command again"):
        Trainer(quick(run_config), tmp_path).run()


def test_enough_is_enough_also_after_a_stop(run_config: Make, losses: list[float], tmp_path: Path) -> None:
    losses += [0.9, 0.5, 0.7, 0.6]
    trainer = Trainer(quick(run_config, patience=2), tmp_path)
    trainer.run()
    assert trainer.step == 4
    assert read(tmp_path / "metrics.jsonl")[-1]["enough"] == "no better held_out than 0.5 of step 2 in 2 evaluations"
    assert (tmp_path / "export").is_dir()
    again = Trainer(quick(run_config, patience=2), tmp_path)
    again.run()
    assert again.step == 4, "the same command again does not go on"


def test_what_is_best_survives_a_stop(run_config: Make, losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses += [0.5, 0.4, 0.6, 0.6]
    real = Trainer._train_step

    def stops(self: Trainer) -> dict[str, torch.Tensor]:
        if self.step == 4:
            raise Stopped("here")
        return real(self)

    monkeypatch.setattr(Trainer, "_train_step", stops)
    with pytest.raises(Stopped):
        Trainer(quick(run_config, patience=3), tmp_path).run()
    monkeypatch.setattr(Trainer, "_train_step", real)
    losses += [0.45]
    trainer = Trainer(quick(run_config, patience=3), tmp_path)
    trainer.run()
    assert trainer.step == 5
    assert trainer.chores.best == Best(pytest.approx(0.4), 2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "rising"), [("held_out", False), ("fd_scatter2-32", False), ("score", True), ("diversity", True)])
def test_better_is_less_or_more_by_name(name: str, rising: bool) -> None:
    best = Best()
    assert best.beaten(name, 1.0, 1)
    assert best.beaten(name, 2.0, 2) == rising
    assert best.beaten(name, 0.5, 3) != rising
    assert not best.beaten(name, best.value or 0.0, 4), "equal is not better"
    assert not best.beaten(name, math.nan, 5)
    assert best.waited == (3 if rising else 2)


def test_a_suite_gives_what_it_gives_offline(run_config: Make, tmp_path: Path) -> None:
    config = run_config(steps=2, evaluate=2, preview_prompts=())
    config = replace(config, evaluation=EvaluationConfig(suite="worlds", every=2, pictures=1, best="diversity"))
    Trainer(config, tmp_path).run()
    (line,) = [x for x in read(tmp_path / "metrics.jsonl") if "evaluation" in x]
    offline = worlds.evaluate(load(tmp_path), worlds.Protocol(1))
    measured = {k: v for k, v in line["evaluation"].items() if k != "seconds_per_image"}
    assert measured == json.loads(json.dumps({k: v for k, v in offline.items() if k != "seconds_per_image"}))
    assert json.loads((tmp_path / "export-best" / "best.json").read_text())["measure"] == "diversity"
    with pytest.raises(UserError, match=r"evaluation\.best is 'beauty', and the suite worlds has: score"):
        chores.find(offline, "beauty")


def beside_its_teacher(make: Make, pipeline: Pipeline, folder: Path, **evaluation: Any) -> RunConfig:
    """A student with a critic that is a pipeline, evaluated after every second step."""
    pipeline.save(folder / "teacher")
    config = make(DMDConfig(critic_turns=1), steps=8, log=2, evaluate=8, preview=4, checkpoint=8)
    config.evaluation = EvaluationConfig("students", every=2, pictures=1, **evaluation)
    return replace(config, init=str(folder / "teacher"))


def test_a_student_is_compared_and_shown_with_its_teacher(run_config: Make, pipeline: Pipeline, tmp_path: Path) -> None:
    config, run = beside_its_teacher(run_config, pipeline, tmp_path, best="gap"), tmp_path / "run"
    Trainer(config, run).run()
    lines = [line["evaluation"] for line in read(run / "metrics.jsonl") if "evaluation" in line]
    teacher = load(tmp_path / "teacher")
    beside = students.Beside(teacher, students.Protocol(1, 2, SEED), 32)
    assert len(lines) == 4
    assert lines[-1] == json.loads(json.dumps(beside.evaluate(load(run)))), "the same as of the exported pipeline"
    assert lines[-1]["gap"] == lines[-1]["teacher"]["score"] - lines[-1]["score"]
    assert lines[-1]["distance"] != lines[0]["distance"], "it is what it has become"
    page = (run / "report.html").read_text()
    assert all(f'alt="{who}: a red star"' in page for who in ("dmd, step 8 of 8", "teacher", "critic"))
    assert base64.b64encode(png_bytes(teacher("a red star")[0])).decode() in page, "from the noise of the student's"
    assert all(f"<h4>{name}</h4>" in page for name in ("critic.loss", "direction", "score", "diversity", "gap"))
    assert "<h4>lr</h4>" not in page
    assert page.count("Nothing was trained.") == 1, "the teacher; the critic has a loss of its own"


def test_a_students_best_weights_are_kept_and_it_ends_when_it_gets_no_better(
    run_config: Make, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.2, 0.5, 0.4, 0.5]
    monkeypatch.setattr(students.Beside, "evaluate", lambda *arguments: {"suite": "students", "score": scores.pop(0)})
    config = beside_its_teacher(run_config, pipeline, tmp_path, best="score", patience=1)
    trainer = Trainer(config, tmp_path / "run")
    trainer.run()
    assert (trainer.step, scores) == (6, [0.5])
    assert json.loads((tmp_path / "run" / "export-best" / "best.json").read_text()) == {"measure": "score", "value": 0.5, "step": 4}
    with pytest.raises(UserError, match=r"this run has none; start from it \(--init\), name it"):
        Trainer(replace(config, init=""), tmp_path / "none")


def test_waiting_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.best must not be empty"):
        EvaluationConfig(best="", patience=2)


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor}
    return sum(storages.values())


def test_evaluation_gives_its_memory_back(run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(run_config(preview=2, evaluate=2, held_out=64), tmp_path)
    trainer._open()
    trainer.chores.open()
    trainer.step, trainer.seconds = 2, 1.0
    before = held()
    trainer.chores.tell({})
    trainer.chores.look()
    assert len(read(tmp_path / "metrics.jsonl")) == 2, "numbers and the held-out loss were written"
    assert (tmp_path / "previews" / "step-00000002.png").exists()
    assert held() == before


def test_loss_by_time_is_the_mean_of_each_tenth() -> None:
    torch.manual_seed(0)
    t, loss = torch.rand(1000), torch.rand(1000)
    t[0], t[1] = 1.0, 0.0
    sums = LossByTime()
    for part in (slice(0, 300), slice(300, 1000)):
        sums.add(t[part], loss[part])
    again = LossByTime()
    again.restore(json.loads(json.dumps(sums.state())), torch.device("cpu"))
    expected = [float(loss[(t * BINS).long().clamp_max(BINS - 1) == k].mean()) for k in range(BINS)]
    assert sums.read() == pytest.approx(expected, rel=1e-3)
    assert again.read() == pytest.approx(expected, rel=1e-3)
    assert sums.read() == []
    sums.add(torch.tensor([0.55]), torch.tensor([2.0]))
    assert sums.read() == [None] * 5 + [2.0] + [None] * 4


def test_a_line_of_the_log_tells_where_time_and_gradients_go(run_config: Make, tmp_path: Path) -> None:
    Trainer(run_config(steps=2, log=2, evaluate=2), tmp_path).run()
    line = read(tmp_path / "metrics.jsonl")[0]
    assert {"loss", "grad_norm", "lr", "images", "seconds", "loss_by_time"} <= set(line)
    blocks = line["grad_norm_by_block"]
    assert {"student.denoiser.blocks.0", "student.denoiser.blocks.1", "student.text.blocks.0"} <= set(blocks)
    assert math.sqrt(sum(norm**2 for norm in blocks.values())) == pytest.approx(line["grad_norm"], rel=1e-2)
    assert line["matmul_share"] > 0
    assert 0 < line["loader_wait"] < 1
    rounded = 0.0005 / line["seconds"]  # the line tells seconds to a thousandth, and these two steps take few of those
    assert line["images_per_second"] == pytest.approx(8 / line["seconds"], rel=rounded + 1e-3)
    assert line["memory_gb"] > 0.01
    page = (tmp_path / "report.html").read_text()
    assert "denoise, step 2 of 2" in page
    assert 'alt="denoise, step 2 of 2: a red star"' in page


def test_the_share_is_of_the_rate_in_the_runs_own_precision(run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("mezzotint.train.chores.matmul_rate", lambda kind, dtype: asked.append((kind, dtype)) or 1e9)
    for precision in ("float32", "bfloat16"):
        config = run_config(steps=1, preview_prompts=())
        Trainer(replace(config, parallel=ParallelConfig(precision=precision)), tmp_path / precision).run()  # type: ignore[arg-type]
    assert asked == [("cpu", torch.float32), ("cpu", torch.bfloat16)]


def test_operations_are_those_that_torch_counts(run_config: Make) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = run_config().pipeline.denoiser.replace(width=128)
    net, cond = config.build(), run_config().pipeline.text.build()(["a red star"] * 2)
    operations = Operations()
    operations.watch(net, config)
    x = torch.randn(2, 3, 64, 64)
    for gradient in (True, False):
        operations.total = 0
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
            out = net(x.requires_grad_(gradient), torch.rand(2), cond)
            if gradient:
                out.sum().backward()
        assert operations.total == pytest.approx(counter.get_total_flops(), rel=0.25), "the embeddings of a tiny network weigh more"
    assert matmul_rate() > 1e8


class Library:
    """What trackio and wandb have in common, written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def init(self, *arguments: Any, **keywords: Any) -> "Library":
        self.calls.append(("init", arguments, keywords))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))

    Image = staticmethod(lambda path: SimpleNamespace(path=path))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_what_the_log_gets(
    name: track.TrackerName, run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, name, library)
    Trainer(run_config(steps=2), tmp_path, track=name).run()
    (kind, arguments, keywords), *logs, end = library.calls
    assert kind == "init"
    assert track.PROJECT in (*arguments, keywords.get("project"))
    assert keywords["config"]["train"]["steps"] == 2
    assert keywords["resume"] == "allow"
    assert end == ("finish",)
    seen: dict[str, Any] = {}
    for _, values, step in logs:
        seen |= {(key, step): value for key, value in values.items()}  # type: ignore[misc]
    for line in read(tmp_path / "metrics.jsonl"):
        if "loss" in line:
            assert seen["loss", line["step"]] == line["loss"]  # type: ignore[index]
    assert ("held_out_by_time/7", 2) in seen
    assert ("grad_norm_by_block/student.denoiser.blocks.0", 1) in seen
    assert seen["preview", 2].path.endswith("step-00000002.png")  # type: ignore[index]


def test_tensorboard_reads_what_was_written(run_config: Make, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(run_config(steps=2), tmp_path, track="tensorboard").run()
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [line["loss"] for line in read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in found.Images("preview")] == [2]


@pytest.mark.parametrize("name", list(track.TRACKERS))
def test_a_tracker_that_is_not_there_is_one_line(name: track.TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("trackio", "wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--track {name} needs the package {name} .*pip install {name}"):
        track.open_tracker(name, tmp_path, 0, {})


def test_runs_are_listed_compared_and_pruned(run_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(steps=2)
    config.optim = config.optim.replace(lengths=(0.05, 0.1), snapshot=1)
    Trainer(config, tmp_path / "runs" / "a").run()
    other = replace(run_config(steps=4), optim=replace(config.optim, lr=2e-3))
    Trainer(other, tmp_path / "runs" / "deep" / "b").run()
    (tmp_path / "runs" / "deep" / "b" / "export" / "pipeline.json").unlink()  # as if it had not ended
    words = ["runs", str(tmp_path / "runs"), "--json"]
    assert main([*words, "--compare", "a", "deep/b"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["step"], r["steps"], r["finished"]) for r in answer["runs"]] == [("a", 2, 2, True), ("deep/b", 4, 4, False)]
    assert answer["differences"] == {"optim.lr": [1e-3, 2e-3], "train.steps": [2, 4]}
    assert main(["runs", str(tmp_path / "runs"), "--compare", "c"]) == 2
    assert "unknown run 'c'" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "runs"), "--prune"]) == 0
    assert "can go; --yes removes them" in capsys.readouterr().out
    steps = [tmp_path / "runs" / name / "checkpoints" / "step-00000002" for name in ("a", "deep/b")]
    assert all(step.exists() for step in steps)
    assert main([*words, "--prune", "--yes"]) == 0
    assert [step.exists() for step in steps] == [False, True], "an unfinished run keeps what it needs"
    capsys.readouterr()
    assert main(["runs", str(tmp_path)]) == 0
    assert "runs/deep/b" in capsys.readouterr().out
    run = tmp_path / "runs" / "a"
    assert main(["average", str(run), "--length", "0.05", "--out", str(tmp_path / "average")]) == 0
    made, shown = load(tmp_path / "average").state_dict(), load(run).state_dict()
    assert all(torch.allclose(made[name], shown[name], atol=1e-5) for name in shown), "the first length is the one that is exported"
    assert main(["runs", str(tmp_path / "average")]) == 2
    assert "no runs in" in capsys.readouterr().err


def test_the_heldout_loss_is_the_one_of_the_average(run_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(run_config(steps=2, evaluate=2), tmp_path)
    trainer.run()
    (line,) = [x for x in read(tmp_path / "metrics.jsonl") if "held_out" in x]
    losses = heldout_loss(load(tmp_path), trainer.source.held_out(4))
    assert float(losses.mean()) == pytest.approx(line["held_out"], abs=1e-7)
