"""The table of all techniques: run, stopped and gone on with, measured alike, and drawn."""

import json
import re
import shutil
from pathlib import Path
from statistics import mean
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from mezzotint.evals.report import plot_svg
from mezzotint.lab.methods import DISTILLERS, TUNERS, Lab, chosen, main
from mezzotint.lab.table import over_seeds, shown
from mezzotint.methods.refl import ReFLConfig
from mezzotint.recipes import RECIPES, tiny
from mezzotint.rewards.model import LearnedConfig
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer


def test_two_techniques_are_run_stopped_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tiny.SIZES, "xs", tiny.Size(width=64, depth=1, text=64, image=32, batch=4, steps=20, lr=1e-3))
    whole = Lab.config

    def quick(self: Lab, name: str, seed: int) -> RunConfig:
        config = whole(self, name, seed)
        config.train = config.train.replace(held_out=2, preview_prompts=())
        return config

    monkeypatch.setattr(Lab, "config", quick)
    torch.manual_seed(0)
    RECIPES["tiny.worlds"]("xs").pipeline.build().save(tmp_path / "teacher")
    out = tmp_path / "lab"
    words = ["--teacher", str(tmp_path / "teacher"), "--size", "xs", "--out", str(out), "--only"]
    real = Trainer._train_step

    def stops(self: Trainer) -> Any:
        if self.config.method.kind == "dpo":
            raise Stopped("stopped at step 0")
        return real(self)

    monkeypatch.setattr(Trainer, "_train_step", stops)
    assert main([*words, "dpo,lcm"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = json.loads((out / "table.json").read_text())
    assert first["students"]["lcm"]["seeds"] == 1
    assert first["students"]["lcm"]["calls"]["4"]["score"][1] is None, "one seed has no error"
    assert not first["tuned"]
    monkeypatch.setattr(Trainer, "_train_step", real)
    assert main([*words, "dpo,lcm", "--list"]) == 0
    assert re.findall(r"^(\w+) +(\w+) +(\d) seeds done$", capsys.readouterr().out, re.MULTILINE) == [
        ("lcm", "distils", "1"),
        ("dpo", "tunes", "0"),
    ]
    assert main([*words, "dpo,lcm"]) == 0
    capsys.readouterr()
    assert main([*words, "lcm", "--seeds", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n| `lcm` | 2 | ") == text.count("\n| `dpo` | 1 | ") == text.count("| (base) |") == text.count("| (teacher) |") == 1

    found = json.loads((out / "table.json").read_text())
    runs = [json.loads((out / "lcm" / f"seed-{seed}" / "measured.json").read_text()) for seed in range(2)]
    assert list(found["students"]["lcm"]["calls"]) == list(found["teacher"]["calls"]) == ["1", "2", "4", "8"]
    assert runs[0]["samples"] == 4 * RECIPES["tiny.lcm"]("xs").train.steps
    assert runs[0]["weights"] == "export-best"
    for calls, row in found["students"]["lcm"]["calls"].items():
        assert row["distance"][0] == pytest.approx(mean(run["calls"][calls]["distance"] for run in runs))
        assert row["distance"][1] > 0, "two seeds are two students"
    svg = (out / "plot.svg").read_text()
    assert all(f">{name}</text>" in svg for name in ("lcm", "dpo", "teacher", "base", "network calls", "diversity"))
    older = out / "lcm" / "seed-0" / "config.json"  # of a run from before one of its settings existed
    config = json.loads(older.read_text())
    del config["train"]["seed"]  # 0 by itself
    older.write_text(json.dumps(config))
    assert main([*words, "lcm"]) == 0
    capsys.readouterr()
    shutil.copytree(tmp_path / "teacher", tmp_path / "other")
    assert main([*words[:1], str(tmp_path / "other"), *words[2:], "lcm"]) == 2
    assert re.search(r"holds experiments from \[.*teacher'\]; choose another folder with --out", capsys.readouterr().err)
    monkeypatch.setitem(tiny.SIZES, "xs", tiny.Size(width=64, depth=1, text=64, image=32, batch=8, steps=20, lr=1e-3))
    assert main([*words, "lcm"]) == 2
    assert "holds a run with other settings; choose another folder with --out" in capsys.readouterr().err


def test_every_technique_starts_where_it_should(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "xs", "a/teacher", "a/base")
    configs = {name: lab.config(name, 3) for name in DISTILLERS + TUNERS}
    assert {name for name in configs if configs[name].init == "a/teacher"} == {*DISTILLERS} - {"instaflow"}
    assert {name for name in configs if configs[name].init == "a/base"} == {*TUNERS}
    assert configs["instaflow"].init == str(tmp_path / "reflow" / "seed-3")
    assert configs["reflow"].data.teacher == "a/teacher"  # type: ignore[union-attr]
    assert configs["instaflow"].data.folder == str(tmp_path / "instaflow" / "seed-3" / "pairs")  # type: ignore[union-attr]
    assert isinstance(configs["refl"].method, ReFLConfig)
    assert configs["refl"].method.goal.reward == LearnedConfig(str(tmp_path / "reward" / "seed-3"))
    assert {config.train.seed for config in configs.values()} == {3}


def test_names_and_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert chosen("dmd, sft,lcm") == ["lcm", "dmd", "sft"]
    assert chosen("") == [*DISTILLERS, *TUNERS]
    assert main(["--only", "lcn", "--out", str(tmp_path)]) == 2
    assert "unknown technique 'lcn'; did you mean 'lcm'?" in capsys.readouterr().err
    assert over_seeds([0.5]) == (0.5, None)
    assert over_seeds([0.4, 0.6]) == pytest.approx((0.5, 0.1))
    assert (shown((0.5, None)), shown((0.5, 0.1)), shown((1234.6, 3.2))) == ("0.500", "0.500 ± 0.100", "1235 ± 3")


def test_a_plot_shows_means_and_errors_and_leaves_out_what_is_no_number() -> None:
    svg = plot_svg([("calls", "judge", {"a<b": [(1.0, 0.2, 0.1), (2.0, 0.4, 0.0), (3.0, float("nan"), 0.0)]})])
    ElementTree.fromstring(svg)  # a file that browsers can read
    assert "a&lt;b" in svg
    assert "nan" not in svg
    (line,) = re.findall(r'points="([^"]+)"', svg)
    (x, y), (x_2, y_2) = ([float(n) for n in place.split(",")] for place in line.split())
    assert x < x_2
    assert y > y_2, "y points down"
    (bar,) = re.findall(rf'd="M{x:.1f},([\d.]+)V([\d.]+)"', svg)
    assert float(bar[0]) - y == pytest.approx(y - float(bar[1]), abs=0.11)
    assert float(bar[0]) - float(bar[1]) == pytest.approx(y - y_2, abs=0.11), "an error of 0.1 to both sides is as far as from 0.2 to 0.4"
    with pytest.raises(ValueError, match="'judge' over 'calls' has none"):
        plot_svg([("calls", "judge", {})])
