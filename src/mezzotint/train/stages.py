"""Stages of a run: for so many steps some of its fields have other values, in one run with one optimizer, one average and one schedule.

That is how a curriculum is written down: pictures small, then large, with times shifted towards noise as they grow; short captions,
then long ones; patches left out, then none. Stages come one after the other. The rest of `train.steps` after the last of them is the run
as its own fields have it, so that these are what is exported in the end. A stage may change what is looked up when a step is made, and
nothing of what networks, optimizers and averages are built from. The learning rate follows one schedule over the whole run, of which
a stage's `optim.lr` is the peak.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from mezzotint import config
from mezzotint.config import Config
from mezzotint.errors import UserError, unknown

C = TypeVar("C", bound=Config)
OF_LOSS = ("times", "drop", "level", "detail", "mask")
CHANGEABLE = (
    "data",
    *(f"method.{name}" for name in OF_LOSS),
    *(f"method.flow.{name}" for name in OF_LOSS if name != "mask"),
    "pipeline.sampling",
    "optim.lr",
    "train.batch",
    "train.accumulate",
)


@dataclass
class StageConfig(config.Config, kind="stage"):
    """steps: how long. changes: values that fields of the run have meanwhile, by their dotted names, as in {"data.size": 16}."""

    steps: int
    changes: dict[str, Any] = field(default_factory=dict)


def changed(run: C, changes: Mapping[str, Any]) -> C:
    """A copy of a run with other values of some fields. UserError for a field that it does not have, or that no stage can change."""
    run = copy.deepcopy(run)
    for name, value in changes.items():
        *path, last = name.split(".")
        owner: Any = run
        for part in path:
            owner = _members(owner).get(part)
        if last not in _members(owner):
            raise unknown("field of a stage", name, (known for known, _ in dotted(run) if changeable(known)))
        if not changeable(name):
            raise UserError(f"{name} cannot change from stage to stage; what can is {', '.join(CHANGEABLE)}")
        value = float(value) if type(value) is int and isinstance(_members(owner)[last], float) else value
        owner.__setitem__(last, value) if isinstance(owner, dict) else setattr(owner, last, value)
    return run


def changeable(name: str) -> bool:
    """Whether a field of a run may have another value in a stage."""
    return any(name == known or name.startswith(f"{known}.") for known in CHANGEABLE)


def dotted(run: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested dataclasses by their dotted names, and what is in dictionaries by its keys."""
    for name, value in _members(run).items():
        if is_dataclass(value) or _members(value):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _members(owner: Any) -> dict[str, Any]:
    """The fields of a dataclass or what is in a dictionary; nothing of anything else."""
    if is_dataclass(owner):
        return {each.name: getattr(owner, each.name) for each in fields(owner)}
    return owner if isinstance(owner, dict) else {}


def become(live: Any, other: Any) -> None:
    """Give a configuration the values of another one in place, so that whoever holds a part of it finds them there."""
    for each in fields(live):
        mine, theirs = getattr(live, each.name), getattr(other, each.name)
        if mine == theirs:
            continue
        if is_dataclass(mine) and type(mine) is type(theirs):
            become(mine, theirs)
        else:
            setattr(live, each.name, copy.deepcopy(theirs))  # what is live is written into, and a stage is not
