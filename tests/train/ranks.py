"""Processes that train together, as torchrun would start them, on one machine."""

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import Worlds, WorldsConfig
from mezzotint.errors import UserError
from mezzotint.recipes import RECIPES  # noqa: F401  # every kind of configuration is known
from mezzotint.train import checkpoint
from mezzotint.train.guard import NonFiniteError
from mezzotint.train.parallel import leave
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer

# Processes of this context are copies of one that has imported what is needed, once for all tests.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["ranks"])


class Uneven(Worlds):
    """A source whose batches have one, two, three, one, ... samples."""

    def batch(self, number: int, size: int) -> Batch:
        return super().batch(number, number % 3 + 1)


class Interrupted(Worlds):
    """A source that sends the process that asks for batch 9 a signal."""

    def batch(self, number: int, size: int) -> Batch:
        if number == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(number, size)


class Poisoned(Worlds):
    """A source with one picture that is not finite, in batch 5."""

    def batch(self, number: int, size: int) -> Batch:
        batch = super().batch(number, size)
        if number == 5:
            batch.images[0, 0, 3, 3] = torch.nan
        return batch


class Deadly(Worlds):
    """A source that ends the process that asks for batch 5."""

    def batch(self, number: int, size: int) -> Batch:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(number, size)


SOURCES = {"worlds": Worlds, "uneven": Uneven, "interrupted": Interrupted, "poisoned": Poisoned, "deadly": Deadly}


@dataclass(frozen=True)
class Job:
    """A run: its folder, its configuration, and where its batches come from."""

    folder: Path
    config: RunConfig
    source: Literal["worlds", "uneven", "interrupted", "poisoned", "deadly"] = "worlds"

    def run(self) -> None:
        """Train, to the end or until the source is the end of it, as it is written to a file of this rank."""
        assert isinstance(self.config.data, WorldsConfig)
        trainer = Trainer(self.config, self.folder, SOURCES[self.source](self.config.data))
        try:
            trainer.run()
        except (Stopped, NonFiniteError, UserError) as error:
            (self.folder / f"end-{trainer.ranks.rank}").write_text(f"{type(error).__name__}: {error}")


def together(world: int, jobs: Sequence[Job], seconds: float = 300.0) -> list[int | None]:
    """Run jobs one after the other on so many ranks. Returns how these ended: 0 is well, None not at all."""
    if world == 1:
        for job in jobs:
            job.run()
        return [0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stored = json.dumps([(str(job.folder), job.config.to_data(), job.source) for job in jobs])
    processes = [START.Process(target=_rank, args=(rank, world, port, stored)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _rank(rank: int, world: int, port: int, stored: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for folder, config, source in json.loads(stored):
        Job(Path(folder), RunConfig.from_data(config), source).run()
    leave()


def killed_run(described: str, folder: Path, where: Literal["in-step", "in-checkpoint"], when: int) -> None:
    """Train until this process kills itself: before step `when`, or in the middle of the `when`-th file of a checkpoint."""
    torch.set_num_threads(1)
    step, write, calls = Trainer._train_step, checkpoint.save_file, []

    def dying_step(trainer: Trainer) -> object:
        calls.append("step")
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    def dying_write(tensors: dict[str, torch.Tensor], path: Path, *rest: object) -> None:
        calls.append("write")
        if len(calls) == when:
            Path(path).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        write(tensors, path, *rest)  # type: ignore[arg-type]

    if where == "in-step":
        Trainer._train_step = dying_step  # type: ignore[assignment, method-assign]
    else:
        checkpoint.save_file = dying_write  # type: ignore[assignment]
    Trainer(RunConfig.from_data(json.loads(described)), folder).run()
