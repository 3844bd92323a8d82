"""The rules of the house, as tests."""

import ast
import json
import re
from pathlib import Path

import pytest

from mezzotint.recipes import RECIPES
from mezzotint.recipes.tiny import SIZES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mezzotint"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from itself and from those above it.
HOUSE = (
    "errors",
    "bars",
    "places",
    "locks",
    "config",
    "flow",
    "models",
    "codecs",
    "text",
    "weights",
    "pipeline",
    "exchange",
    "pictures",
    "worlds",
    "data",
    "rewards",
    "evals",
    "curation",
    "methods",
    "train",
    "recipes",
    "lab",
)
HOUSE += ("chain", "speedrun", "lifecycle", "options", "words", "curate", "cli")
LIMITS = {"methods": 300, "models": 450, "recipes": 100}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "mezzotint":
            names = [f"mezzotint.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mezzotint.")}
    return rooms & set(HOUSE)


@pytest.mark.parametrize("path", [f for f in FILES if room(f) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_down(path: Path) -> None:
    here = HOUSE.index(room(path))
    below = {name for name in imported_rooms(path) if HOUSE.index(name) > here}
    assert not below, f"{path.name} imports from rooms below its own: {sorted(below)}"


def test_flow_imports_torch_only() -> None:
    for path in (PACKAGE / "flow").glob("*.py"):
        roots = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        assert roots <= {"torch", "mezzotint", "collections", "dataclasses", "typing", "math"}, path
        assert imported_rooms(path) <= {"flow"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LIMITS.get(room(path), 600)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", [f for f in FILES if f.read_text()], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_things_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} does not say what it is for"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and room(path) != "cli":
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_there_is_one_loop() -> None:
    loops = [path.name for path in FILES for line in path.read_text().splitlines() if re.match(r"\s*while .*step.* <", line)]
    assert loops == ["trainer.py"]
    for path in (PACKAGE / "methods").glob("*.py"):
        text = path.read_text()
        assert ".backward(" not in text, path
        assert "optim" not in text.replace("optimiz", "").replace("optimis", ""), path
        assert "distributed" not in text, path


def test_nothing_is_pickled() -> None:
    runs_code = r"(import|from) pickle|\bpickle\.\w|torch\.load\(|torch\.save\(|\beval\(|\bexec\("
    for path in FILES:
        assert not re.search(runs_code, path.read_text().replace(".eval(", "")), path


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_builds(name: str, size: str) -> None:
    import torch

    config = RECIPES[name](size)  # type: ignore[arg-type]
    with torch.device("meta"):
        config.method.build(config.pipeline.build())
    again = type(config).from_data(json.loads(json.dumps(config.to_data())))
    assert again == config
