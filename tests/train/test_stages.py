"""Stages: one run with one counter, optimizer, average and log, which resumes in any of them; what they may change; what they cost."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from together import START, killed_run
from torch import Tensor

from mezzotint.cli import main
from mezzotint.data.batch import Batch, Loader
from mezzotint.data.folder import FolderConfig
from mezzotint.data.worlds import Worlds, WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods import denoise
from mezzotint.models import Cond
from mezzotint.pipeline import Pipeline, load
from mezzotint.recipes import RECIPES
from mezzotint.recipes.tiny import SizeName
from mezzotint.train import checkpoint
from mezzotint.train.devices import DEVICES
from mezzotint.train.heldout import heldout_loss
from mezzotint.train.log import read
from mezzotint.train.plan import Setup, by_stage, plan
from mezzotint.train.stages import StageConfig, become, changed
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer
from mezzotint.words import run_fields, with_run_fields

Make = Callable[..., RunConfig]
SMALL = {
    "data.size": 16,
    "data.long_every": 0,
    "method.times.ratio": 0.5,
    "pipeline.sampling.size": 16,
    "optim.lr": 2e-3,
    "train.batch": 2,
    "train.accumulate": 2,
}


@pytest.fixture(scope="module")
def staged(run_config_once: Make) -> RunConfig:
    """Two steps of four small pictures, two of small ones with patches left out, two of four large ones."""
    config = run_config_once(checkpoint=3)
    masked = {"data.size": 16, "data.long_every": 0, "pipeline.sampling.size": 16, "method.mask": 0.5}
    return config.replace(stages=(StageConfig(2, SMALL), StageConfig(2, masked)))


@pytest.fixture(scope="module")
def seen() -> list[tuple[int, int, int | None]]:
    """Of every loss of the run: the side of its pictures, their number, and how many patches of each were kept."""
    return []


@pytest.fixture(scope="module")
def whole(staged: RunConfig, seen: list[tuple[int, int, int | None]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run."""
    folder, real = tmp_path_factory.mktemp("staged") / "run", denoise.flow_difference

    def watch(pipeline: Pipeline, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if torch.is_grad_enabled():  # not in evaluations
            seen.append((x0.shape[-1], len(x0), None if cond.keep is None else cond.keep.shape[1]))
        return real(pipeline, x0, eps, t, cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoise, "flow_difference", watch)
        Trainer(staged, folder).run()
    return folder


def losses(folder: Path) -> list[tuple[int, int, float]]:
    return [(line["step"], line["stage"], line["loss"]) for line in read(folder / "metrics.jsonl") if "loss" in line]


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same weights, average, optimizer and log."""
    last = [checkpoint.steps(folder / "checkpoints")[-1] for folder in (a, b)]
    for file in last[0].glob("*.safetensors"):
        tensors, others = load_file(file), load_file(last[1] / file.name)
        if not all(torch.equal(tensors[name], others[name]) for name in tensors | others):
            return False
    held = [[(x["step"], x["stage"], x["held_out"]) for x in read(folder / "metrics.jsonl") if "held_out" in x] for folder in (a, b)]
    return last[0].name == last[1].name and losses(a) == losses(b) and held[0] == held[1]


def test_stages_are_one_run(whole: Path, staged: RunConfig) -> None:
    log = read(whole / "metrics.jsonl")
    assert [(step, stage) for step, stage, _ in losses(whole)] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert [line["images"] for line in log if "loss" in line] == [4, 8, 12, 16, 20, 24]
    rates = [line["lr"] for line in log if "loss" in line]
    assert rates[:2] == [2 * staged.optim.rate(step, 6) for step in range(2)]
    assert rates[2:] == [staged.optim.rate(step, 6) for step in range(2, 6)]
    # What is due at a boundary sees the stage that begins, though a run of six steps evaluates every three only.
    assert [(line["step"], line["stage"]) for line in log if "held_out" in line] == [(2, 1), (3, 1), (4, 2), (6, 2)]
    assert "3 of 3" in (whole / "report.html").read_text()
    assert load(whole).config.sampling == staged.pipeline.sampling, "what is exported draws as the run's own fields say"


def test_losses_are_of_the_stage(whole: Path, seen: list[tuple[int, int, int | None]]) -> None:
    assert seen == 4 * [(16, 2, None)] + 2 * [(16, 4, 2)] + 2 * [(32, 4, None)]


def test_previews_are_of_the_stage(whole: Path) -> None:
    from PIL import Image

    sizes = {path.stem: Image.open(path).size for path in sorted((whole / "previews").iterdir())}
    assert sizes == {"step-00000002": (16, 16), "step-00000003": (16, 16), "step-00000004": (32, 32), "step-00000006": (32, 32)}


def test_a_run_that_is_stopped_after_every_step_is_the_same(whole: Path, staged: RunConfig, tmp_path: Path) -> None:
    hurried = staged.replace(train=staged.train.replace(deadline=1e-6))
    for step in range(1, 6):
        trainer = Trainer(hurried, tmp_path)
        with pytest.raises(Stopped, match=f"step {step}"):
            trainer.run()
        if step == 4:  # a boundary: what is held out is of the data of the stage that begins, whoever asks
            expected = heldout_loss(trainer.pipeline, WorldsConfig().build().held_out(4)).mean()
            assert read(tmp_path / "metrics.jsonl")[-1]["held_out"] == float(expected)
            assert trainer.source.held_out(1).images.shape[-1] == 32
    Trainer(hurried, tmp_path).run()
    assert same(whole, tmp_path)


@pytest.mark.parametrize(("where", "when"), [("in-step", 3), ("in-checkpoint", 8)])
def test_kill_9_in_any_stage_is_the_same_run(where: str, when: int, whole: Path, staged: RunConfig, tmp_path: Path) -> None:
    # Before the first step of the second stage; in the second of three files of the checkpoint between that stage and the next.
    killed = START.Process(target=killed_run, args=(json.dumps(staged.to_data()), tmp_path, where, when))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    Trainer(staged, tmp_path).run()
    assert same(whole, tmp_path)


class Poisoned(Worlds):
    """A source of large pictures whose first batches have a number that is not finite."""

    def batch(self, number: int, size: int) -> Batch:
        batch = super().batch(number, size)
        if number == 4:
            batch.images[0, 0, 0, 0] = torch.nan
        return batch


def test_a_bad_step_rolls_back_into_an_earlier_stage(staged: RunConfig, tmp_path: Path) -> None:
    # The bad step 4, the first of the last stage, is read after it, and the only checkpoint is that of step 0: back over two boundaries.
    config = staged.replace(guard=staged.guard.replace(policy="rollback"), train=staged.train.replace(log=7, checkpoint=100))
    trainer = Trainer(config, tmp_path, Poisoned(WorldsConfig()))
    trainer.chores.due = lambda interval: trainer.step == 6 or (trainer.step == 5 and interval == 7)  # type: ignore[method-assign]
    trainer.run()
    assert trainer.moved == {4: 1}
    assert (trainer.step, trainer.stage, trainer.loader.position) == (6, 2, 7)


def test_data_go_on_after_the_samples_that_were_taken() -> None:
    loader = Loader(WorldsConfig(size=8).build(), 2, streams=3)
    for _ in range(3):
        next(loader)  # 18 samples, of all streams
    loader.go_on(loader.source, 4, 2)
    assert loader.position == 3  # 24 samples: the next batches that have none of the 18
    loader.go_on(loader.source, 2, 3)
    assert loader.position == 4


def test_whatever_holds_a_part_of_a_configuration_finds_the_stage_there(staged: RunConfig) -> None:
    live, stages = staged.replace(), staged.staged()
    live = changed(live, {})
    times, data = live.method.times, live.data  # type: ignore[attr-defined]
    become(live, stages[0])
    assert live == stages[0]
    assert times.ratio == 0.5
    assert live.data is data
    folder = changed(staged, {"data": FolderConfig("pictures", size=8)})
    become(live, folder)
    assert live == folder
    become(live, changed(folder, {"data.size": 9}))
    assert (live.data.size, folder.data.size) == (9, 8)
    assert staged.method.times.ratio == 1.0, "the run's own description stays"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sise": 8}, "unknown field of a stage 'data.sise'; did you mean 'data.size'?"),
        ({"train.seed": 8}, "train.seed cannot change from stage to stage; what can is data, "),
        ({"pipeline.denoiser.depth": 8}, "pipeline.denoiser.depth cannot change"),
        ({"method.nothing": 8}, "unknown field of a stage 'method.nothing'"),
    ],
)
def test_what_a_stage_cannot_change_is_named(changes: dict[str, Any], message: str, staged: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Trainer(staged.replace(stages=(StageConfig(1, changes),)), tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [(0,), (6,), (3, 3), (2, -1)])
def test_stages_leave_a_step_to_the_run_itself(steps: tuple[int, ...], staged: RunConfig) -> None:
    with pytest.raises(UserError, match="stages must have a step or more and end before the run"):
        staged.replace(stages=tuple(StageConfig(n) for n in steps)).staged()


def test_other_stages_are_other_settings(whole: Path, staged: RunConfig) -> None:
    other = staged.replace(stages=(StageConfig(2, SMALL | {"data.size": 24}), staged.stages[1]))
    with pytest.raises(UserError, match=r"\(stages\.0\.changes\.data\.size was 16, now 24\)"):
        Trainer(other, whole).run()


def test_stages_are_set_by_name() -> None:
    config = RECIPES["tiny.curriculum"]("xs")
    words = [
        "--stages.0.steps",
        "40",
        "--stages.0.data.size=32",
        "--train.steps",
        "100",
        "--stages.1.steps=5",
        "--stages.1.optim.lr",
        "1e-4",
    ]
    made = with_run_fields(config, words, "train tiny.curriculum")
    assert [stage.steps for stage in made.stages] == [40, 5]
    assert made.stages[0].changes == config.stages[0].changes | {"data.size": 32}
    assert made.stages[1].changes == {"optim.lr": 1e-4}
    assert made.train.steps == 100
    assert RunConfig.from_data(json.loads(json.dumps(made.to_data()))) == made
    assert {("stages.0.steps", 40), ("stages.1.optim.lr", 1e-4), ("train.steps", 100)} <= {
        (name, value) for name, value in run_fields(made) if isinstance(value, int | float)
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.0.data.sise", "8"], "unknown field of stages.0 'data.sise'; did you mean 'data.size'?"),
        (["--stages.0.train.bacth", "8"], "unknown field of stages.0 'train.bacth'; did you mean 'train.batch'?"),
        (["--stages.3.steps", "8"], "unknown field of tiny.masked 'stages.3'"),
        (["--train.steps", "50"], "stages must have a step or more and end before the run, and they end after steps 108, 50"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.masked", "--size", "xs", "--out", str(tmp_path), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().count("\n") == 0


def test_a_plan_counts_every_stage(staged: RunConfig) -> None:
    setup, device = Setup(precision="float32"), DEVICES["h100"]
    made, parts = plan(staged, setup, device), by_stage(staged, setup, device)
    alone = plan(staged.replace(stages=()), setup, device)
    assert [part.steps for part in parts] == [2, 2, 2]
    assert made.steps == 6
    assert made.days == pytest.approx(sum(part.days for part in parts))
    assert made.step_s == pytest.approx(made.days * 86_400 / 6)
    assert made.images_per_day * made.days == pytest.approx(6 * 4)
    assert made.peak_train_gb == max(part.peak_train_gb for part in parts)
    assert parts[-1].flops == alone.flops > parts[0].flops > parts[1].flops > 0
    assert made.flops == pytest.approx(sum(part.flops for part in parts) / 3)
    assert made.days < alone.days


@pytest.mark.parametrize("name", ["tiny.curriculum", "tiny.masked"])
@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
def test_recipes_end_with_whole_large_pictures(name: str, size: SizeName) -> None:
    first, last = RECIPES[name](size).staged()
    assert last.method.mask == 0  # type: ignore[attr-defined]
    assert (first.data.size < last.data.size) == (first.method.mask == 0) == (name == "tiny.curriculum")  # type: ignore[attr-defined]
    for stage in (first, last):
        assert stage.pipeline.sampling.size == stage.data.size
        stage.pipeline.denoiser.grid(stage.data.size, stage.data.size)
