"""Processes that train together, as torchrun would start them, on one machine."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import bright  # noqa: F401  # every kind of configuration is known
import lettered  # noqa: F401
import prepared  # noqa: F401
import torch
import torch.distributed as dist
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.data.worlds import Worlds, WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.method import Metrics, Turn
from mezzotint.recipes import RECIPES  # noqa: F401
from mezzotint.text import blank  # noqa: F401
from mezzotint.train import checkpoint
from mezzotint.train.guard import NonFiniteError
from mezzotint.train.parallel import leave
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import Portion, RunConfig, Trainer

# Processes of this context are copies of one that has imported what is needed, once for all tests. It knows the package, and no tests.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["mezzotint.recipes", "mezzotint.train.trainer"])


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


class Mortal(Trainer):
    """A trainer whose rank 1 is killed in the middle of its second step, after a forward and before its backward."""

    def _loss(self, portion: Portion, turn: Turn, number: int) -> tuple[Tensor, Metrics]:
        computed = super()._loss(portion, turn, number)
        if self.step == 1 and self.ranks.rank == 1:
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return computed


class Coupled(Uneven):
    """A source as uneven, whose pictures are latents that come with their noise."""

    def batch(self, number: int, size: int) -> Batch:
        batch = super().batch(number, size)
        noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(number))
        return replace(batch, latents=batch.images, noise=noise)


SourceName = Literal["worlds", "uneven", "interrupted", "poisoned", "deadly", "coupled"]
SOURCES: dict[SourceName, type[Worlds]] = {
    "worlds": Worlds,
    "uneven": Uneven,
    "interrupted": Interrupted,
    "poisoned": Poisoned,
    "deadly": Deadly,
    "coupled": Coupled,
}


@dataclass(frozen=True)
class Job:
    """A run: its folder, its configuration, where its batches come from, and how it ends before its time.

    killed: "in-step" rank 1, "in-checkpoint" all ranks, in the middle of their second file of the second checkpoint.
    """

    folder: Path
    config: RunConfig
    source: SourceName = "worlds"
    killed: Literal["", "in-step", "in-checkpoint"] = ""

    def run(self) -> None:
        """Train, to the end or until the source is the end of it, as it is written to a file of this rank."""
        assert isinstance(self.config.data, WorldsConfig)
        made = Mortal if self.killed == "in-step" else Trainer
        trainer = made(self.config, self.folder, SOURCES[self.source](self.config.data))
        if self.killed == "in-checkpoint":
            die_writing(2 + len(trainer.method.roles) + len(trainer.averages) + len(trainer.optimizers), trainer.ranks.world)
        try:
            trainer.run()
        except (Stopped, NonFiniteError, UserError) as error:
            (self.folder / f"end-{trainer.ranks.rank}").write_text(f"{type(error).__name__}: {error}")
            if self.killed:
                raise


def together(world: int, jobs: Sequence[Job], seconds: float = 300.0) -> list[int | None]:
    """Run jobs one after the other on so many ranks. Returns how these ended: 0 is well, None not at all."""
    if world == 1:
        for job in jobs:
            job.run()
        return [0]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where ranks meet, outside of them as with torchrun
    stored = json.dumps([(str(job.folder), job.config.to_data(), job.source, job.killed) for job in jobs])
    processes = [START.Process(target=_rank, args=(rank, world, store.port, stored)) for rank in range(world)]
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
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    for folder, config, *rest in json.loads(stored):
        Job(Path(folder), RunConfig.from_data(config), *rest).run()
    leave()


def die_writing(when: int, world: int = 1) -> None:
    """From now on this process kills itself in the middle of the `when`-th file of its checkpoints, when as many others are there."""
    write, calls = checkpoint.save_file, []

    def dying_write(tensors: dict[str, Tensor], path: Path, *rest: object) -> None:
        calls.append(path)
        if len(calls) == when:
            path.write_bytes(b"half a file")
            path.with_suffix(".dying").touch()
            while len(list(path.parent.glob("*.dying"))) < world:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        write(tensors, path, *rest)  # type: ignore[arg-type]

    checkpoint.save_file = dying_write  # type: ignore[assignment]


def killed_run(described: str, folder: Path, where: Literal["in-step", "in-checkpoint"], when: int) -> None:
    """Train until this process kills itself: before step `when`, or in the middle of the `when`-th file of a checkpoint."""
    torch.set_num_threads(1)
    step, calls = Trainer._train_step, []

    def dying_step(trainer: Trainer) -> object:
        calls.append("step")
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    if where == "in-step":
        Trainer._train_step = dying_step  # type: ignore[assignment, method-assign]
    else:
        die_writing(when)
    Trainer(RunConfig.from_data(json.loads(described)), folder).run()
