"""Where it fits: every part of a run is described by a dataclass that stands beside the class it builds.

In: the `Config` base, which gives a description a stored form (plain data, no code) and a way back.
Out: the descriptions themselves; each lives in the file of what it builds.
Gotchas: `kind` is part of the file format of runs and checkpoints. Renaming a class is free, renaming a kind is not.
"""

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self, get_type_hints

from mezzotint.errors import UserError, unknown

Data = dict[str, Any]


class Config:
    """Base of all configurations: a dataclass, named by its `kind` in stored data.

    A subclass is declared as ``@dataclass class Config(config.Config, kind="dit")`` and has a ``build(...)``.
    """

    kinds: ClassVar[dict[str, type["Config"]]] = {}
    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if kind in Config.kinds:
            raise TypeError(f"two configurations are called {kind!r}: {Config.kinds[kind].__qualname__} and {cls.__qualname__}")
        cls.kind = kind
        Config.kinds[kind] = cls

    def to_data(self) -> Data:
        """The configuration as JSON-ready data; nested configurations carry their `kind`."""
        fields = {f.name: _to_data(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **fields}

    @classmethod
    def from_data(cls, data: Data) -> Self:
        """The configuration that `to_data` stored. Unknown kinds and fields are a `UserError` that names the nearest."""
        value = _from_data(data)
        if not isinstance(value, cls):
            raise UserError(f"expected a {cls.__qualname__} configuration, found {data.get('kind')!r}")
        return value

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _to_data(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_data()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _to_data(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_data(v) for v in value]
    return value


def _from_data(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_data(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        return {key: _from_data(v) for key, v in value.items()}
    if value["kind"] not in Config.kinds:
        raise unknown("kind of configuration", str(value["kind"]), Config.kinds)
    return _fill(Config.kinds[value["kind"]], {k: v for k, v in value.items() if k != "kind"}, value["kind"])


def _fill(cls: type, data: Data, name: str) -> Any:
    """A dataclass from data; a field whose declared type is a plain dataclass is filled the same way."""
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for field, value in data.items():
        if field not in known:
            raise unknown(f"field of {name!r}", field, known)
        hint = hints[field]
        if isinstance(value, dict) and "kind" not in value and dataclasses.is_dataclass(hint):
            values[field] = _fill(hint, value, f"{name}.{field}")  # type: ignore[arg-type]
        elif hint is float and type(value) is int:  # JSON writers drop the point of 1.0
            values[field] = float(value)
        else:
            values[field] = _from_data(value)
    return cls(**values)


def inside(folder: Path, name: str) -> Path:
    """A file in `folder` that stored data names. UserError where the name leads out of the folder: data may come from anybody."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise UserError(f"{folder} names a file outside of its folder: {name!r}; do not use it unless you know why")
    return folder / path
