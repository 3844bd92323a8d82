"""The command line as a user meets it: what it prints, what it writes, and its exit codes."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

from mezzotint.cli import VERBS, main
from mezzotint.flow.solvers import SOLVERS
from mezzotint.models import PRESETS
from mezzotint.options import SolverName, TrackerName
from mezzotint.pictures import to_pil
from mezzotint.pipeline import Pipeline, load
from mezzotint.recipes import tiny
from mezzotint.train import track
from mezzotint.train.log import read

FAST = ["--size", "xs", "--train.steps", "2", "--train.batch", "2", "--train.held-out", "2", "--train.log", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of twelve captioned pictures."""
    data = tmp_path / "pictures"
    data.mkdir()
    for k in range(12):
        Image.new("RGB", (40, 30), (20 * k, 100, 255 - 20 * k)).save(data / f"{k}.png")
        (data / f"{k}.txt").write_text(f"colour number {k}\n")
    return data


def test_help_answers_within_a_second() -> None:
    command = [sys.executable, "-m", "mezzotint.cli", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of the processor, whoever else wants it
    assert all(f"\n  {verb} " in out for verb in VERBS)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from mezzotint.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smaple"], "unknown verb 'smaple'; did you mean 'sample'?"),
        (["train", "tiny.world"], "unknown recipe 'tiny.world'; did you mean 'tiny.worlds'?"),
        (["train", "tiny.worlds", "--train.stpes", "3"], "unknown field of tiny.worlds 'train.stpes'; did you mean 'train.steps'?"),
        (["sample", "a star", "--model", "nowhere"], "no pipeline at nowhere: the folder does not exist"),
        (["train", "tiny.images", "--data", "nowhere"], "nowhere"),
        (["train", "tiny.images"], "tiny.images trains on pictures of your own: --data DIR"),
        (["eval", "nowhere"], "no pipeline at nowhere"),
        (["sample"], "Missing from mezzotint sample: PROMPT"),
        (["sample", "a star", "--stpes", "3"], "unknown option of sample '--stpes'; did you mean '--steps'?"),
        (["sample", "--prompt", "a star"], "sample takes its prompt without a name: mezzotint sample PROMPT"),
        (["runs", "--folder=runs"], "runs takes its folder without a name: mezzotint runs FOLDER"),
        (["sample", "a", "star"], "sample has no use for 'star'; a text of several words goes into quotes"),
        (["sample", "a star", "--n", "0"], "--n must be a whole number of at least 1, got '0'"),
        (["sample", "a star", "--steps", "many"], "--steps must be a whole number of at least 1, got 'many'"),
        (["sample", "a star", "--guidance", "nan"], "--guidance must be a number of at least 0, got 'nan'"),
        (["sample", "a star", "--solver", "foo"], "--solver must be one of consistency, ddpm"),
        (["sample", "a star", "--out", f"{__file__}/x.png"], f"cannot write {__file__}/x.png: {__file__} is not a folder"),
        (["import", str(Path(__file__).parent), "--out", __file__], "is not a folder; choose another place with --out"),
        (["sample", "a star", "--out", "x.jpg"], "--out must be a file name that ends in .png, got 'x.jpg'"),
        (["sample", "a star", "--size", "100000", "--steps", "1"], "this needs more memory than there is"),
        (["eval", "starter", "--suite", "foo"], "invalid choice 'foo' for argument '--suite'"),
        (["eval", "starter", "--suite", "images"], "the suite images needs a folder of images: --data DIR"),
        (["average", "nowhere", "--length", "0.1", "--out", "x"], "no run at nowhere"),
        (["plan", "tiny.worlds", "--gpus", "0"], "--gpus must be a whole number of at least 1, got '0'"),
        (["train", "tiny.worlds", "--train.steps", "many"], "--train.steps"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""


def test_what_can_be_known_without_torch_is_answered_at_once() -> None:
    for words in (
        ["sample", "a", "--model", "nowhere"],
        ["sample", "a", "--n", "0"],
        ["eval", "nowhere"],
        ["train", "tiny.sft", "--init", "no"],
        ["sample", "a", "--out", f"{__file__}/x.png"],
    ):
        code = f"import sys; from mezzotint.cli import main; assert main({words}) == 2; assert 'torch' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0, words


def test_names_in_the_help_are_those_of_the_package() -> None:
    assert sorted(get_args(SolverName)) == sorted(SOLVERS)
    assert get_args(TrackerName) == get_args(track.TrackerName)


def test_fields_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.worlds", "--fields"]) == 0
    out = capsys.readouterr().out
    assert "train.steps = " in out
    assert "method.times.mean = " in out


def test_a_size_may_have_two_sides(pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.save(tmp_path)
    words = ["sample", "a star", "--model", str(tmp_path), "--out", str(tmp_path / "x.png"), "--steps", "1", "--size"]
    assert main([*words, "48x64"]) == 0
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == (48, 64)  # width and height
    assert "Size: 48x64" in picture.text["parameters"]  # type: ignore[attr-defined]
    assert main([*words, "48"]) == 0
    assert Image.open(tmp_path / "x.png").size == (48, 48)
    capsys.readouterr()
    for wrong in ("48x", "axb", "1x2x3", "0"):
        assert main([*words, wrong]) == 2
        assert "--size must be a side in pixels or WIDTHxHEIGHT" in capsys.readouterr().err


def test_the_precision_of_weights_is_asked_for(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "half", torch.float16)
    drawn = {}
    for dtype in ("float32", "float16", "stored", "bfloat16"):
        file = tmp_path / f"{dtype}.png"
        assert main(["sample", "a red star", "--model", str(tmp_path / "half"), "--dtype", dtype, "--out", str(file)]) == 0
        drawn[dtype] = Image.open(file).tobytes()
    assert drawn["stored"] == drawn["float16"]
    assert len({drawn["float32"], drawn["float16"], drawn["bfloat16"]}) == 3


def test_training_on_a_folder_then_sampling_and_measuring(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ["train", "tiny.images", "--data", str(folder), "--out", str(run), *FAST, "--data.held-out", "0.3"]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "fd_scatter2-32" in first.out
    assert main(words) == 0, "a finished run goes on from its end"
    assert (run / "previews").is_dir()
    assert main(["sample", "colour number 3", "--model", str(run), "--n", "2", "--seed", "5", "--out", str(tmp_path / "x.png")]) == 0
    picture = Image.open(tmp_path / "x-1.png")
    assert picture.tobytes() == to_pil(load(run)("colour number 3", 2, seed=5)[1]).tobytes()
    assert "Seed: 6" in picture.text["parameters"]  # type: ignore[attr-defined]
    assert main(["eval", str(run), "--suite", "images", "--data", str(folder), "--json"]) in (0, 2)


def test_unusable_images_are_reported_and_kept(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.png").write_bytes(b"")
    before = sorted(folder.iterdir())
    words = ["train", "tiny.images", "--data", str(folder), "--out", str(tmp_path / "run"), *FAST, "--data.held-out", "0.3"]
    assert main(words) == 0
    assert "set aside" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
    assert json.loads((tmp_path / "run" / "set-aside.jsonl").read_text().splitlines()[0])["file"] == "broken.png"
    assert main([*words[:-2], "--data.max-bad", "0.01"]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_eval_prints_one_json_object(pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.save(tmp_path)
    assert main(["eval", str(tmp_path), "--suite", "worlds", "--prompts", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["score"] <= 1
    assert set(result["tasks"]) == {"one object", "two objects", "counting", "colours", "position", "binding"}
    assert {"heldout", "preference", "diversity", "protocol"} <= set(result)


def test_models_are_listed_within_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    assert main(["models", "--json"]) == 0
    assert time.process_time() - start < 5
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == PRESETS.keys()
    dit = rows["dit-xl-2"]
    assert (dit["architecture"], dit["parameters"], dit["pixels"], dit["source"]) == ("class_dit", 674_834_720, 256, "Peebles & Xie 2023")
    assert dit["flops"] == pytest.approx(2 * 118.64e9, rel=0.01)  # as published
    assert main(["models"]) == 0
    assert "flux-dev" in capsys.readouterr().out


def test_a_deadline_ends_a_run_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.worlds", *FAST, "--train.deadline", "1e-6", "--out", str(tmp_path)]) == 0
    assert "stopped at step 1; everything is saved, the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_speedrun_runs_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole chain at a size of seconds: stopped in its third stage, it goes on and ends in a report."""
    from mezzotint import speedrun
    from mezzotint.train.stop import Stopped
    from mezzotint.train.trainer import Trainer

    monkeypatch.setitem(tiny.SIZES, "xs", tiny.Size(width=64, depth=1, text=64, image=32, batch=4, steps=40, lr=1e-3))
    monkeypatch.setitem(speedrun.PROMPTS_PER_TASK, "xs", 2)
    real = Trainer._train_step

    def stops(self: Trainer) -> tuple[dict[str, float], bool]:
        if self.folder.name == "dpo":
            raise Stopped("stopped at step 0")
        return real(self)

    monkeypatch.setattr(Trainer, "_train_step", stops)
    words = ["speedrun", "--size", "xs", "--out", str(tmp_path / "run")]
    assert main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    done = (tmp_path / "run" / "sft" / "evaluation.json").read_text()
    monkeypatch.setattr(Trainer, "_train_step", real)
    assert main(words) == 0
    assert (tmp_path / "run" / "sft" / "evaluation.json").read_text() == done
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(part.title in page for part in speedrun.parts(tmp_path / "run", "xs"))
    assert "mezzotint sample" in capsys.readouterr().out
    losses = [line["loss"] for line in read(tmp_path / "run" / "dpo" / "metrics.jsonl") if "loss" in line]
    assert losses
    distilled = load(tmp_path / "run" / "distil")
    assert distilled.config.sampling.steps == 4
    assert torch.isfinite(distilled("a red star")).all()
