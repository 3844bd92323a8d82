"""Checkpoints: safetensors and JSON in one folder per step, written whole or not at all.

A folder is written under another name, flushed to the disk, and renamed; a process killed at any instant leaves the last
whole checkpoint untouched. Nothing is pickled, so loading one cannot run code.

Every rank writes its share of every tensor, with its place in the whole in the file's metadata, in the form of
torch.distributed.checkpoint's Hugging Face storage, whose reader puts the shares together again for any number of ranks.
Where we differ from its writer: that one makes the bytes of a file in memory and holds Python's lock meanwhile, which stops
the loop for longer than half of the time that writing takes.
"""

import json
import os
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from mezzotint.config import inside
from mezzotint.errors import UserError
from mezzotint.train.parallel import share_like

Tensors = dict[str, Tensor]
STATE = "state.json"
PLACES = "DCP_SHARDING_INFO"  # the key by which the reader finds where a share begins
WAIT = 600.0  # seconds for which rank 0 waits for the files of the others


@dataclass(frozen=True)
class Share:
    """What one rank has of a tensor, and where it begins in the whole along each axis."""

    tensor: Tensor
    start: tuple[int, ...]


def shares(tensors: Tensors, main: bool) -> dict[str, Share]:
    """What this rank has to write: its shares, without those that a replica of it writes; what is on all ranks, if it is `main`."""
    own = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if main:
                own[name] = Share(tensor.detach(), (0,) * tensor.ndim)
            continue
        mesh = tensor.device_mesh
        first = all(mesh.get_local_rank(axis) == 0 for axis, placed in enumerate(tensor.placements) if placed.is_replicate())
        if first and tensor.to_local().numel():
            _, start = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
            own[name] = Share(tensor.to_local().detach(), tuple(start))
    return own


class Saver:
    """Writes the checkpoints of a run while it goes on. It only waits for an earlier one to be written, and before its next update until
    its tensors are copied, which happens beside the forward and backward passes that come first.

    The copies live as long as the saver does: memory that is new for every checkpoint costs many times what copying does. Rank 0
    names a checkpoint whole when the files of all ranks are there, which takes a file system that all of them see.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1, keep: int = 2) -> None:
        self.folder, self.rank, self.world, self.keep = folder, rank, world, keep
        self.copies: dict[str, Tensors] = {}
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.copied = threading.Event()
        self.copied.set()

    def save(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any], spare: Collection[int] = ()) -> None:
        """Begin to write what this rank has as checkpoint `step`, beside the newest ones and those of the steps to `spare`.

        Tensors may change after `settle`.
        """
        self.finish()
        own = {group: shares(named, self.rank == 0) for group, named in tensors.items()}
        self.copied.clear()
        arguments = (step, own, state, frozenset(spare), _stream(own))
        self.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self.thread.start()

    def settle(self) -> None:
        """Wait until what is written is copied."""
        self.copied.wait()

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written: a `UserError`, if it is the disk's."""
        if self.error is not None:
            raise self.error

    def finish(self, seconds: float | None = None) -> None:
        """Wait until everything is written, or for so many seconds."""
        if self.thread is not None:
            self.thread.join(seconds)
        self.check()

    @torch.no_grad()
    def _copy(self, group: str, own: dict[str, Share]) -> dict[str, Share]:
        kept = self.copies.setdefault(group, {})
        for name, share in own.items():
            if name not in kept or kept[name].shape != share.tensor.shape:
                kept[name] = torch.empty_like(share.tensor, device="cpu", memory_format=torch.contiguous_format)
        if own:  # before the first step optimizers have no state
            torch._foreach_copy_([kept[name] for name in own], [share.tensor for share in own.values()])
        return {name: Share(kept[name], share.start) for name, share in own.items()}

    def _write(
        self,
        step: int,
        own: dict[str, dict[str, Share]],
        state: dict[str, Any],
        spare: Collection[int],
        stream: torch.cuda.Stream | None,
    ) -> None:
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                copied = {group: self._copy(group, named) for group, named in own.items()}
            self.copied.set()
            write(self.folder, step, copied, state, self.keep, spare, self.rank, self.world)
        except Exception as error:  # it is raised where the loop is
            self.error = error
        finally:
            self.copied.set()


def _stream(own: Mapping[str, Mapping[str, Share]]) -> torch.cuda.Stream | None:
    """Where copies from a GPU go beside what it computes from now on; in the stream of that they would stand in line."""
    if not any(share.tensor.is_cuda for named in own.values() for share in named.values()):
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def write(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Share]],
    state: dict[str, Any],
    keep: int = 2,
    spare: Collection[int] = (),
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write this rank's files of checkpoint `step`; on rank 0 wait for the others, then name it whole and remove the old ones.

    All but the `keep` newest and those of the steps to `spare` are removed. UserError where the disk does not take it.
    """
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    try:
        if world == 1:
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
        checksums = {}
        for group, own in groups.items():
            file = part / f"{group}{_suffix(rank, world)}.safetensors"
            places = {f"{group}/{name}": {"saved_offsets": share.start} for name, share in own.items()}
            named = {f"{group}/{name}": share.tensor for name, share in own.items()}
            save_file(named, file, {"format": "pt", PLACES: json.dumps(places)})
            _flush(file)
            checksums[file.name] = _checksum(file)
        done = part / f"rank{_suffix(rank, world)}.done"
        done.with_suffix(".part").write_text(json.dumps(checksums))
        done.with_suffix(".part").replace(done)
        if rank == 0:
            _wait_for(part, world)
            _name_whole(part, final, state)
            remove_old(folder, keep, spare)
    except (OSError, SafetensorError) as error:
        if world == 1:
            shutil.rmtree(part, ignore_errors=True)
        kept = f"; the last whole one is {steps(folder)[-1].name}" if steps(folder) else ""
        raise UserError(f"cannot write checkpoint {final}: {error}; free some space and run the same command again{kept}") from error


def _suffix(rank: int, world: int) -> str:
    return "" if world == 1 else f".{rank + 1:05d}-of-{world:05d}"


def _wait_for(part: Path, world: int) -> None:
    limit = time.monotonic() + WAIT
    while len(there := list(part.glob("rank*.done"))) < world:
        if time.monotonic() > limit:
            raise OSError(f"only {len(there)} of {world} ranks have written their files; all ranks must see the same folder")
        time.sleep(0.01)


def _name_whole(part: Path, final: Path, state: dict[str, Any]) -> None:
    files: dict[str, int] = {}
    for done in sorted(part.glob("rank*.done")):
        files |= json.loads(done.read_text())
        done.unlink()
    (part / STATE).write_text(json.dumps({**state, "files": files}))
    _flush(part / STATE)
    _flush(part)
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    _flush(final.parent)


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def remove_old(folder: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Remove all checkpoints but the `keep` newest and those of the steps to `spare`."""
    for old in steps(folder)[:-keep]:
        if number(old) not in spare:
            shutil.rmtree(old, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for part in folder.glob(".step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def number(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


class Checkpoint:
    """A whole checkpoint. UserError where it is damaged: it names what is, and what to do.

    state: what was stored beside the tensors. shapes, types: of the tensors of every group, by their names. checked: which of the files
    are read whole and compared with their checksums; many ranks do that between them.
    """

    def __init__(self, folder: Path, checked: slice = slice(None)) -> None:
        self.folder = folder
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self.types: dict[str, dict[str, torch.dtype]] = {}
        try:
            self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
            files: dict[str, int] = self.state["files"]
            for file in files:
                self._survey(inside(folder, file))
            for file in list(files)[checked]:
                if _checksum(folder / file) != files[file]:
                    raise ValueError(f"{file} is not what was written")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            raise self._damaged(error) from error

    def _survey(self, file: Path) -> None:
        with safe_open(file, framework="pt") as stored:
            places = json.loads(stored.metadata()[PLACES])
            for name in stored.keys():  # noqa: SIM118  # not a dictionary
                group, own = name.split("/", 1)
                share = stored.get_slice(name)
                end = [start + size for start, size in zip(places[name]["saved_offsets"], share.get_shape(), strict=True)]
                known = self.shapes.setdefault(group, {}).get(own, end)
                self.shapes[group][own] = tuple(max(pair) for pair in zip(known, end, strict=True))
                self.types.setdefault(group, {})[own] = (share[:0] if end else share[...]).dtype

    def fill(self, groups: Mapping[str, Tensors]) -> None:
        """Read tensors in place, whole ones or this rank's shares of them; all ranks call it together.

        UserError where one is not there or has another shape.
        """
        wrong = [f"{group}/{name}" for group, named in groups.items() for name, t in named.items() if self._shape(group, name) != t.shape]
        if wrong:
            raise self._damaged(f"{wrong[0]} is missing or has another shape, {len(wrong)} in all")
        wanted = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
                dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=not dist.is_initialized())
        except (OSError, SafetensorError, CheckpointException) as error:
            raise self._damaged(error) from error

    def _shape(self, group: str, name: str) -> tuple[int, ...] | None:
        return self.shapes.get(group, {}).get(name)

    def _damaged(self, error: object) -> UserError:
        before = [folder.name for folder in steps(self.folder.parent) if folder < self.folder]
        then = f"go on from {before[-1]}" if before else "begin anew, since there is none before it"
        return UserError(f"checkpoint {self.folder} is damaged ({error}); remove that folder to {then}")


def optimizer_tensors(module: nn.Module, optimizers: Iterable[Optimizer]) -> Tensors:
    """The states of a module's optimizers as named tensors: "head.weight.exp_avg" is `exp_avg` of its parameter `head.weight`."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    return {f"{name}.{key}": value for name, p in module.named_parameters() for key, value in states.get(p, {}).items()}


def prepare_optimizers(module: nn.Module, optimizers: Iterable[Optimizer], saved: Checkpoint, group: str) -> Tensors:
    """Give optimizers the states that a group of a checkpoint has, to be filled, and no others. Returns them as `optimizer_tensors` does.

    What has as many rows as its parameter is spread over the ranks as that is.
    """
    optimizers, shapes = list(optimizers), saved.shapes.get(group, {})
    for optimizer in optimizers:
        optimizer.state.clear()  # a checkpoint of before the first step has none
    owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, p in module.named_parameters():
        for key in (full.removeprefix(f"{name}.") for full in shapes if full.startswith(f"{name}.")):
            if p in owners and "." not in key:
                shape, dtype = shapes[f"{name}.{key}"], saved.types[group][f"{name}.{key}"]
                if shape == p.shape:
                    owners[p].state[p][key] = torch.zeros_like(p, dtype=dtype)
                else:
                    value = torch.zeros(shape, dtype=dtype, device=p.device)
                    owners[p].state[p][key] = share_like(value, p) if shape else value
    return optimizer_tensors(module, optimizers)
