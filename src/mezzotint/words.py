"""Where it fits: the words of a command line become dataclasses. `options` says which there are, `cli` and `curate` what is done with them.

In: `options`, for what a verb takes; `with_fields`, for a configuration of which any field can be set by its dotted name;
`with_run_fields`, for that of a run, whose stages have fields too. tyro reads them. Out: what the words mean.
Gotchas: what is wrong with a word is a `UserError` of one line, whatever tyro says of it.
"""

import io
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import is_dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints
from unittest import mock

import tyro

from mezzotint.errors import UserError, unknown

if TYPE_CHECKING:
    from mezzotint.train.stages import StageConfig
    from mezzotint.train.trainer import RunConfig

T = TypeVar("T")
PLACED = tyro.conf.Positional[int].__metadata__[0]  # type: ignore[attr-defined]  # what marks a word that has its place


def options(kind: type[T], words: Sequence[str], verb: str, more: bool = False) -> tuple[T, list[str]]:
    """What a verb takes, and the words that are none of its own, which only a verb that takes fields of a recipe may be given (`more`)."""
    hints = get_type_hints(kind, include_extras=True)
    placed = [name for name in hints if PLACED in getattr(hints[name], "__metadata__", ())]
    known = [name for name in hints if name not in placed]
    for name in filter(None, map(_name, words)):
        if name in placed:
            raise UserError(f"{verb} takes its {name} without a name: mezzotint {verb} {name.upper()}")
        if name not in ("help", *known) and not more:
            raise unknown(f"option of {verb}", f"--{_flag(name)}", [f"--{_flag(each)}" for each in known])
    conf = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    found, rest = _read(kind, words, f"mezzotint {verb}", config=conf, return_unknown_args=True)
    if rest and (not more or not rest[0].startswith("-")):
        raise UserError(f"{verb} has no use for {rest[0]!r}; a text of several words goes into quotes")
    return found, rest


def with_fields(config: T, words: Sequence[str], what: str) -> T:
    """A configuration with fields set by words such as ``--train.steps 100``. UserError for one that it does not have."""
    known = set(_names(config))
    for name in filter(None, map(_name, words)):
        if name not in known and name != "help":
            raise unknown(f"field of {what.split()[-1]}", name, known)
    conf = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    changed: T = _read(type(config), words, f"mezzotint {what}", default=config, config=conf)
    return changed


def with_run_fields(config: "RunConfig", words: Sequence[str], what: str) -> "RunConfig":
    """A run's configuration with fields set by words, those of its stages too. UserError for one that it does not have."""
    from mezzotint.train.stages import StageConfig

    own, staged = _by_stage(words)
    stages = list(config.stages)
    config = with_fields(replace(config, stages=()), own, what)
    for number, given in sorted(staged.items()):
        if number > len(stages):
            raise unknown(f"field of {what.split()[-1]}", f"stages.{number}", [f"stages.{k}" for k in range(len(stages) + 1)])
        stages += [StageConfig(0)] * (number == len(stages))
        stages[number] = _stage(config, stages[number], given, f"{what} stages.{number}")
    return replace(config, stages=tuple(stages))


def run_fields(config: "RunConfig") -> Iterable[tuple[str, Any]]:
    """All fields of a run and of its stages by the names that set them."""
    from mezzotint.train.stages import dotted

    yield from ((name, value) for name, value in dotted(config) if name != "stages")
    for number, stage in enumerate(config.stages):
        yield from ((f"stages.{number}.{name}", value) for name, value in {"steps": stage.steps, **stage.changes}.items())


def _names(config: Any) -> Iterable[str]:
    """The dotted names of all fields, those of dataclasses in a row by their numbers: cuts.0.least."""
    from mezzotint.train.stages import dotted

    for name, value in dotted(config):
        yield name
        for number, each in enumerate(value if isinstance(value, tuple) else ()):
            yield from (f"{name}.{number}.{inner}" for inner in (_names(each) if is_dataclass(each) else ()))


def _by_stage(words: Sequence[str]) -> tuple[list[str], dict[int, list[str]]]:
    """Words that set fields of a run, and those that set fields of its stages, ``--stages.0.optim.lr 1e-3``, without that beginning."""
    own, staged = list[str](), dict[int, list[str]]()
    into = own
    for word in words:
        found = re.match(r"--stages\.(\d+)\.(.*)", word, re.DOTALL)
        if found:
            into = staged.setdefault(int(found[1]), [])
            word = f"--{found[2]}"
        elif word.startswith("--"):
            into = own
        into.append(word)
    return own, staged


def _stage(config: "RunConfig", stage: "StageConfig", words: Sequence[str], what: str) -> "StageConfig":
    """A stage with fields set by words; its length is called `steps`."""
    from mezzotint.train.stages import StageConfig, changeable, changed, dotted

    run = changed(config, stage.changes)
    run.train = replace(run.train, steps=stage.steps)
    names = [_name(word) for word in words if word.startswith("--")]
    for name in names:
        if name != "steps" and not changeable(name):
            raise unknown(f"field of {what.split()[-1]}", name, ["steps", *(known for known, _ in dotted(run) if changeable(known))])
    run = with_fields(run, ["--train.steps" + word.removeprefix("--steps") if _name(word) == "steps" else word for word in words], what)
    values = dict(dotted(run))
    return StageConfig(run.train.steps, stage.changes | {name: values[name] for name in names if name != "steps"})


def _name(word: str) -> str:
    """The field that a word such as ``--train.batch=8`` sets; empty for a value."""
    return word.removeprefix("--").split("=")[0].replace("-", "_") if word.startswith("--") else ""


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _read(kind: type, words: Sequence[str], command: str, **settings: Any) -> Any:
    """What tyro makes of words. UserError with its complaint, which it frames, with help below, as one line."""
    wide = {} if {"-h", "--help"} & {*words} else {"COLUMNS": "10000"}  # no line is broken
    said = io.StringIO()
    try:
        with redirect_stderr(said), mock.patch.dict(os.environ, wide):
            return tyro.cli(kind, args=words, prog=command, **settings)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_complaint(said.getvalue())}; {command} --help says what there is") from None


def _complaint(framed: str) -> str:
    """The first paragraph below the title, in a frame of whatever signs the terminal has."""
    lines = [line.strip("│ ") for line in framed.splitlines()[1:]]
    first = next(" ".join(some) for text, some in groupby(lines, lambda line: line.strip("─╰╯- ") != "") if text)
    return re.sub(r"^Error parsing (\S+):", r"\1", first.replace(" (required)", "")).removesuffix(".")
