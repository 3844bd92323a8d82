"""What the README says is so."""

import importlib
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from mezzotint.cli import OPEN, VERBS
from mezzotint.data.mixture import found
from mezzotint.flow.solvers import SOLVERS
from mezzotint.models import PRESETS
from mezzotint.options import PlanOptions, TrainOptions
from mezzotint.recipes import RECIPES
from mezzotint.recipes.published import published
from mezzotint.words import options, with_run_fields

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
DOCS = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in ("LOG", "LEADERBOARD")}
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", "".join([TEXT, *DOCS.values()]), re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]


def test_the_tree_is_the_tree() -> None:
    (tree,) = (block for kind, block in BLOCKS if kind == "" and block.startswith("src/mezzotint/"))
    inside = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    package = ROOT / "src" / "mezzotint"
    there = {p.name for p in package.iterdir() if not p.name.startswith("__") and p.name != "py.typed"}
    assert inside == there
    outside = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:] if not line.startswith("  ")}
    assert all((ROOT / name).is_dir() for name in outside)
    assert {"bench", "docs", "tests"} == outside


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    started = re.search(r"(?:torchrun|srun) .*-m mezzotint\.cli ([^']*)", command)
    words = shlex.split(f"mezzotint {started[1]}" if started else command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[0] in (".venv/bin/mezzotint", "mezzotint", ".venv/bin/python", "python")
    if words[1] == "-m":  # an experiment of the lab
        assert not tyro.cli(importlib.import_module(words[2]).Options, args=words[3:], return_unknown_args=True)[1]
        return
    if words[0].endswith("python"):
        assert (ROOT / words[1]).is_file()
        return
    length = 3 if words[1] == "data" else 2  # the engine's verbs are two words
    verb = " ".join(words[1:length])
    parsed, rest = options(VERBS[verb][0], words[length:], verb, verb in OPEN)
    if isinstance(parsed, TrainOptions | PlanOptions):  # which take any field of their recipe
        config = published(parsed.recipe) if parsed.recipe in PRESETS else RECIPES[parsed.recipe]("s")
        if isinstance(parsed, TrainOptions) and parsed.data:
            config.data = found(parsed.data, config.data.size)
        with_run_fields(config, rest, f"{words[1]} {parsed.recipe}")
        return
    assert not rest


def test_files_named_are_there() -> None:
    for text in (TEXT, *DOCS.values()):
        for name in re.findall(r"`((?:src|docs|tests|bench)/[\w/.-]+)", text):
            assert (ROOT / name).exists(), name


def test_tests_named_in_the_conventions_are_there() -> None:
    path = ""
    for name in re.findall(r"`((?:tests/[\w/]+\.py)?::\w+)`", DOCS["conventions"]):
        file, test = name.split("::")
        path = file or path
        assert f"def {test}(" in (ROOT / path).read_text(), name


def test_pictures_shown_are_there() -> None:
    for folder, text in ((ROOT, TEXT), *((ROOT / "docs", text) for text in DOCS.values())):
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            assert (folder / name).is_file(), name


def test_the_page_on_sampling_shows_what_its_command_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_sampling.py"))
    assert drawn["table"]() in DOCS["sampling"]
    assert all(f"| `{name}` |" in DOCS["sampling"] for name in SOLVERS)
    assert all(f">{name}</text>" in (ROOT / "docs" / "solvers.svg").read_text() for name in drawn["SHOWN"])


def test_the_page_on_architectures_shows_what_its_command_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_architectures.py"))
    assert drawn["table"](drawn["work_row"]) in DOCS["architectures"]
    assert all(f"| `{name}` |" in DOCS["architectures"].split("## Memory")[1] for name in drawn["SHOWN"])
    for name in ("sana-1600m", "fuse-dit-2b", "uvit-h-2"):  # the others take longer
        assert drawn["memory_row"](name) in DOCS["architectures"]


def test_the_test_command_of_ci_is_the_readmes() -> None:
    assert "make test" in COMMANDS
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0
