"""Reading safetensors files, whole or in shards, tensor by tensor; writing them shard by shard.

Nothing else is read: a pickle (.bin, .ckpt, .pt, .pth) runs whatever code its writer put into it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.config import inside
from mezzotint.errors import UserError, listed

SHARD = 10 * 10**9  # bytes; diffusers' own
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class Stored(Mapping[str, Tensor]):
    """The tensors of some files by name, file by file. Each is read when it is asked for, and kept by whoever asked.

    One file is open at a time: what was read of a file counts as memory of the process until it is closed. UserError for a damaged
    file.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(sorted(files.items(), key=lambda item: item[1]))  # by the tensor's name
        self._path = Path()
        self._file: Any = None
        for path in dict.fromkeys(self._files.values()):
            held = set(self._at(path).keys())
            if absent := [name for name, file in self._files.items() if file == path and name not in held]:
                raise UserError(f"{path} does not hold what its index says: {listed(absent)}")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._at(self._files[name]).get_tensor(name)
        return tensor.clone()  # a view of the file may lie unaligned, and products then differ in their last bits

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def meta(self) -> dict[str, Tensor]:
        """The same without numbers, from the files' headers."""
        return {name: torch.empty(self._at(path).get_slice(name).get_shape(), device="meta") for name, path in self._files.items()}

    def _at(self, path: Path) -> Any:
        """The open file; the one before is closed."""
        if path != self._path:
            self._path, self._file = path, opened(path)
        return self._file


class Part(Mapping[str, Tensor]):
    """Those tensors of a mapping whose names begin with a prefix, without it."""

    def __init__(self, whole: Mapping[str, Tensor], prefix: str) -> None:
        self._whole, self._prefix = whole, prefix
        self._names = [name.removeprefix(prefix) for name in whole if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def opened(path: Path) -> Any:
    """A safetensors file, its header read. UserError where it is none."""
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, and reading one runs any code that is in it; look for a .safetensors file of the same model")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_file(path: Path) -> Stored:
    """The tensors of one file."""
    return Stored(dict.fromkeys(opened(path).keys(), path))


def read_folder(folder: Path, stem: str) -> Stored:
    """The tensors of STEM.safetensors, or of the shards that STEM.safetensors.index.json lists. UserError where there are none."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return read_file(whole)
    if index.is_file():
        return Stored({name: inside(folder, file) for name, file in read_json(index).get("weight_map", {}).items()})
    pickles = [path for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
    if pickles:
        opened(pickles[0])
    raise UserError(f"no weights in {folder}: expected {whole.name} or {index.name}")


def write_folder(folder: Path, stem: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], limit: int = SHARD) -> None:
    """Write STEM.safetensors, or shards and STEM.safetensors.index.json where that would be larger than `limit` bytes.

    sizes: of the tensors in bytes. A shard is as large as the limit at most, but for a single tensor that is larger. Tensors are asked
    for shard by shard, and copied: several may be views of one. Files that the folder held under these names before are removed.
    """
    shards = _shards(sizes, limit)
    files = [f"{stem}-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [f"{stem}.safetensors"]
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name):
            path.unlink()
    for file, names in zip(files, shards, strict=True):
        save_file({name: tensors[name].clone(memory_format=torch.contiguous_format) for name in names}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, as many in a row as there is room for."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. UserError where it is none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object")
    return data
