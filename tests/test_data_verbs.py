"""The data engine from the command line: from a folder to a table, a page and a model, with two commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.cli import main
from mezzotint.data.table import Table


@pytest.fixture
def heap(tmp_path: Path) -> Path:
    """Twelve pictures, one of them twice, one too small, one that is none."""
    folder = tmp_path / "heap"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a pattern of number {number}")
    (folder / "again.png").write_bytes((folder / "03.png").read_bytes())
    Image.new("RGB", (16, 16)).save(folder / "small.png")
    (folder / "none.png").write_bytes(b"not a picture")
    return folder


def test_from_a_folder_to_a_model_with_two_commands(heap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, run = tmp_path / "heap.lance", tmp_path / "run"
    assert main(["data", "curate", str(heap), "--out", str(table), "--recipe", "pixels", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    verdicts = {row["id"]: row["verdict"] for row in Table.open(table).read(["id", "verdict"]).to_pylist()}
    assert verdicts["none.png"].startswith("fault: not an image")
    assert verdicts["small.png"] == "short_side 16 is below 32"
    assert sum(verdict.startswith("duplicate_of") for verdict in verdicts.values()) == 1
    assert sum(not verdict for verdict in verdicts.values()) == 12
    assert f"mezzotint train tiny.images --data {table}" in out
    assert (tmp_path / "heap.html").exists()

    words = ["train", "tiny.images", "--size", "xs", "--data", str(table), "--out", str(run), "--train.steps", "1", "--train.batch", "4"]
    assert main(words) == 0
    assert "11 to train on, 1 held out" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["data"]["version"] == str(Table.open(table).version)


def test_the_same_command_again_measures_nothing_again(heap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "curate", str(heap), "--out", str(tmp_path / "t.lance"), "--recipe", "pixels", "--workers", "1"]
    assert main(words) == 0
    version = Table.open(tmp_path / "t.lance").version
    assert main(words) == 0
    assert Table.open(tmp_path / "t.lance").version == version


def test_a_threshold_is_changed_by_its_name(heap: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.lance"
    words = ["data", "curate", str(heap), "--out", str(table), "--recipe", "pixels", "--workers", "1"]
    assert main(words) == 0
    assert main(["data", "curate", str(table), "--recipe", "pixels", "--workers", "1", "--cuts.0.least", "8"]) == 0
    verdicts = {row["id"]: row["verdict"] for row in Table.open(table).read(["id", "verdict"]).to_pylist()}
    assert not verdicts["small.png"].startswith("short_side")


def test_what_went_before_is_named_and_found(heap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(tmp_path / "t.lance")
    assert main(["data", "ingest", str(heap), "--out", table]) == 0
    assert main(["data", "snapshot", table, "raw"]) == 0
    assert main(["data", "dedup", table, "--workers", "1"]) == 0
    assert "1 duplicates of 15" in capsys.readouterr().out
    assert main(["data", "inspect", table, "again.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["duplicate_of"] == "03.png"
    assert main(["data", "inspect", table, "again.png", "--json", "--version", "raw"]) == 0
    assert "duplicate_of" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["curate", "{heap}"], "is no table; say where to make one of it with --out"),
        (["curate", "{heap}", "--out", "{out}", "--recipe", "photo"], "did you mean 'photos'"),
        (["ingest", "{heap}/nothing", "--out", "{out}"], "there is no file or folder"),
        (["report", "{heap}"], "there is no table at"),
        (["look", "{out}"], "unknown verb 'data look'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, heap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *(word.format(heap=heap, out=tmp_path / "t.lance") for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
