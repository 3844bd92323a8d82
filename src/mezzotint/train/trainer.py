"""The one loop.

The Trainer owns what a technique need not know: optimizers, accumulation, clipping, averages, checkpoints, what follows a bad
step, and stopping; what looks at a run is in `train.chores`. Randomness of step k is a function of (seed, rank, k), so stopping at
any step and starting again is the same as never having stopped, bit for bit on one machine.
"""

import json
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn

from mezzotint import config
from mezzotint.config import Config
from mezzotint.data.batch import Batch, Loader, Source
from mezzotint.data.folder import FolderConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.method import MethodConfig, Metrics, Turn
from mezzotint.pipeline import Pipeline, PipelineConfig, load, load_weights
from mezzotint.train import checkpoint
from mezzotint.train.average import FOLDER as AVERAGES
from mezzotint.train.average import Average
from mezzotint.train.chores import Chores
from mezzotint.train.evaluation import EvaluationConfig
from mezzotint.train.guard import (
    MOST_MOVED,
    BadStepError,
    Guard,
    GuardConfig,
    Place,
    Trouble,
    check_loss,
    check_precision,
    describe,
    enough_memory,
    explain,
)
from mezzotint.train.optim import OptimConfig, block, clip_, step_
from mezzotint.train.speed import Operations
from mezzotint.train.stop import Stopped, StopRequest
from mezzotint.train.track import TrackerName, open_tracker

MAY_CHANGE = "guard."  # what follows a bad step is decided when there is one


@dataclass
class TrainConfig(config.Config, kind="train"):
    """steps, batch: how long, with how many samples a step and rank. accumulate: batches per step.

    log, preview, evaluate, checkpoint: every so many steps (and at the end). preview_prompts: prompts of the previews,
    drawn with seeds 0, 1, ... held_out: samples of the held-out loss. export: precision of the exported weights.
    """

    steps: int = 1000
    batch: int = 128
    accumulate: int = 1
    seed: int = 0
    log: int = 20
    preview: int = 500
    evaluate: int = 250
    checkpoint: int = 250
    held_out: int = 256
    preview_prompts: tuple[str, ...] = ()
    export: Literal["float32", "float16"] = "float32"


@dataclass
class RunConfig(config.Config, kind="run"):
    """A whole training run. init: the pipeline to start from (see `pipeline.load`); empty: from scratch."""

    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: WorldsConfig | FolderConfig = field(default_factory=WorldsConfig)
    method: MethodConfig = field(default_factory=DenoiseConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    init: str = ""


class Trainer:
    """Trains one method in one folder; `run` starts, or goes on where the folder's last checkpoint is."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        source: Source | None = None,
        progress: Progress | None = None,
        track: TrackerName | None = None,
    ) -> None:
        self.config, self.folder, self.progress, self.track = config, folder, progress, track
        self.rank = 0
        self.step = 0
        self.seconds = 0.0
        torch.manual_seed(config.train.seed)
        pipeline = config.pipeline.build()
        if config.init:
            load_weights(pipeline, load(config.init).state_dict(), Path(config.init))
        self.method = config.method.build(pipeline)
        self.source = source or config.data.build()
        self.loader = Loader(self.source, config.train.batch)
        trained = {name: role for name, role in self.method.roles.items() if role.trained}
        self.parameters = {name: [p for p in role.module.parameters() if p.requires_grad] for name, role in trained.items()}
        self.optimizers = {name: config.optim.build(role.module) for name, role in trained.items()}
        optim = config.optim
        self.averages = {n: Average(r.module, optim.average, optim.lengths) for n, r in self.method.roles.items() if r.averaged}
        check_precision(self.method.roles)
        self.blocks = {n: [block(name) for name, p in r.module.named_parameters() if p.requires_grad] for n, r in trained.items()}
        self.guard = Guard(config.guard)
        self.chores = Chores(self)
        self.moved: dict[int, int] = {}  # steps whose first batches are left out, and how many
        self.operations = Operations()
        for role in self.method.roles.values():
            if isinstance(role.module, Pipeline):
                self.operations.watch(role.module.denoiser, role.module.config.denoiser)
        for role in self.method.roles.values():
            role.module.requires_grad_(False)
            role.module.train(role.trained)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that previews, evaluation and export see: the student's average where one is kept."""
        module = self.averages["student"].shown if "student" in self.averages else self.method.student
        assert isinstance(module, Pipeline)
        return module

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.method.student.parameters()).device

    def run(self) -> Pipeline:
        """Train to the last step and export. Raises `Stopped` after a clean stop, `BadStepError` where numbers end."""
        self._open()
        chores, every = self.chores, self.config.train
        chores.open()
        if self.track:
            chores.tracker = open_tracker(self.track, self.folder, self.step, self.config.to_data())
        task = self.progress.add_task(self.folder.name, total=every.steps, completed=self.step) if self.progress else None
        with closing(chores), StopRequest() as stop, enough_memory(every.batch, every.accumulate):
            while self.step < every.steps and not chores.enough:
                start = time.perf_counter()
                metrics = self._train_step()
                self.step += 1
                sound = not (stop.asked or chores.any_due()) or self._examine()
                self.seconds += time.perf_counter() - start
                if not sound:  # the run is back at its last checkpoint
                    continue
                self._after_step(metrics, stop.asked)
                if self.progress and task is not None:
                    self.progress.update(task, completed=self.step, note=chores.note)
                if stop.asked:
                    raise Stopped(f"stopped at step {self.step}")
        self.pipeline.save(self.folder / "export", getattr(torch, every.export))
        return self.pipeline

    def _train_step(self) -> dict[str, Tensor]:
        """One step of the method: all its turns. Returns the numbers to log, which are still on the device."""
        logged: dict[str, Tensor] = {}
        self.loader.position += self.moved.get(self.step, 0)
        place, batches = self._batches()
        for number, turn in enumerate(self.method.turns(self.step), start=1):
            loss = self._accumulate(batches, turn, number, logged)
            for name in turn:
                self._update(name, place, turn, number, loss, logged)
        self.method.after_step(self.step)
        return logged

    def _batches(self) -> tuple[Place, list[Batch]]:
        """What this step learns from, and where it is in the data."""
        self._seed(0)
        position = self.loader.position
        batches = [batch for _ in range(self.config.train.accumulate) for batch in self.method.experience(self.loader, self.step)]
        return Place(self.step, position, self.loader.position - position), batches

    def _accumulate(self, batches: list[Batch], turn: Turn, number: int, logged: dict[str, Tensor]) -> Tensor:
        """Gradients of a turn: the mean over all samples of all batches. Returns the loss."""
        samples = sum(len(batch) for batch in batches)
        prefix = "" if turn == ("student",) else f"{'+'.join(turn)}."
        self._train_only(turn)
        for index, batch in enumerate(batches):
            loss, metrics = self._loss(batch, turn, number, index)
            check_loss(loss, metrics)
            share = len(batch) / samples
            (loss * share).backward()
            for key, value in {**metrics, "loss": loss.detach()}.items():
                if key != "t":
                    so_far = logged.get(prefix + key) if index else None
                    part = share * value.detach().float().mean()
                    logged[prefix + key] = part if so_far is None else so_far + part
            if not prefix and "t" in metrics and metrics["t"].shape == metrics.get("loss", loss).shape:
                self.chores.by_time.add(metrics["t"], metrics["loss"])
        return logged[f"{prefix}loss"]

    def _train_only(self, turn: Turn) -> None:
        for name, parameters in self.parameters.items():
            for p in parameters:
                p.requires_grad_(name in turn)

    def _loss(self, batch: Batch, turn: Turn, number: int, index: int) -> tuple[Tensor, Metrics]:
        self._seed(number, index)
        return self.method.loss(batch, turn, self.step)

    def _update(self, name: str, place: Place, turn: Turn, number: int, loss: Tensor, logged: dict[str, Tensor]) -> None:
        """Clip, step the optimizers unless the guard holds them, and move the average of one role."""
        norms = clip_(self.parameters[name], self.config.optim.clip)
        held = self.guard.judge(place, number, turn, name, loss, norms.total)
        logged["grad_norm" if name == "student" else f"{name}.grad_norm"] = norms.total
        self.chores.norms[name] = norms
        for optimizer in self.optimizers[name]:
            step_(optimizer, self.config.optim.rate(self.step, self.config.train.steps), held)
        if name in self.averages:
            self.averages[name].update(self.method.roles[name].module, self.step)

    def _seed(self, *place: int) -> None:
        """Seed all randomness of a call from (seed, rank, step, place in the step)."""
        mixed = 0
        for number in (self.config.train.seed, self.rank, self.step, *place):
            mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
        # As torch.manual_seed does, without asking every kind of device there could be, which takes it half a millisecond.
        torch.default_generator.manual_seed(mixed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(mixed)

    def _after_step(self, metrics: dict[str, Tensor], stopping: bool) -> None:
        """Chores, stored averages, and the checkpoint, as they are due."""
        if self.step - 1 in self.moved:
            self.chores.write(moved=self.moved[self.step - 1])
        self.chores(metrics)
        if self.config.optim.lengths and self.chores.due(self.config.optim.snapshot):
            for name, average in self.averages.items():
                average.store(self.folder / AVERAGES / name, self.step)
        if self.chores.due(self.config.train.checkpoint) or stopping or self.chores.enough:
            self._save()

    def _examine(self) -> bool:
        """Read what the guard found since the last time. Returns False where the run has to roll back; raises where it has to end."""
        for trouble in self.guard.read():
            if self.config.guard.policy == "skip":
                self.chores.write(held=trouble.place.step, role=trouble.role, why=describe(trouble))
                continue
            error = self._explained(trouble)
            place = trouble.place
            moved = self.moved.get(place.step, 0) + max(1, place.used)
            if self.config.guard.policy == "stop" or moved > MOST_MOVED * max(1, place.used):
                raise error
            self._roll_back(place.step, moved)
            return False
        return True

    def _explained(self, trouble: Trouble) -> BadStepError:
        """The error for a bad update, made again from the weights that it met."""
        self.step, self.loader.position = trouble.place.step, trouble.place.position
        _, batches = self._batches()
        self._train_only(trouble.turn)
        again = lambda index: self._loss(batches[index], trouble.turn, trouble.number, index)  # noqa: E731
        return explain(trouble, self.method.roles, batches, again, self.folder / "bad" / f"step-{self.step:08d}")

    def _roll_back(self, step: int, batches: int) -> None:
        """Go back to the last checkpoint, and let a step leave out so many batches when it comes again.

        A run that is killed before its next checkpoint meets the bad step again and does the same, so nothing need be stored here.
        """
        self._restore(checkpoint.steps(self.folder / "checkpoints")[-1])
        self.moved[step] = batches
        self.chores.open()

    def _save(self) -> None:
        tensors = {name: role.module.state_dict() for name, role in self.method.roles.items()}
        tensors |= {name: module.state_dict() for name, module in self._averages().items()}
        for name, optimizers in self.optimizers.items():
            tensors |= {f"{name}.optimizer{i}": checkpoint.optimizer_tensors(o) for i, o in enumerate(optimizers)}
        state: dict[str, Any] = {"step": self.step, "position": self.loader.position, "seconds": self.seconds}
        state |= {
            "config": self.config.to_data(),
            "guard": self.guard.state(),
            "chores": self.chores.state(),
            "moved": [*self.moved.items()],
        }
        checkpoint.write(self.folder / "checkpoints", self.step, tensors, state)

    def _averages(self) -> dict[str, nn.Module]:
        """All averages by the names that they have in checkpoints: student.average, student.average1, ..."""
        return {f"{n}.average{i or ''}": m for n, average in self.averages.items() for i, m in enumerate(average.modules)}

    def _open(self) -> None:
        """Make the run's folder, or go on from its last checkpoint."""
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            found = checkpoint.steps(self.folder / "checkpoints")
            if not found:
                (self.folder / "config.json").write_text(json.dumps(self.config.to_data(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another folder with --out") from error
        if found:
            self._restore(found[-1])
        elif self.config.guard.policy == "rollback":
            self._save()

    def _restore(self, folder: Path) -> None:
        tensors, state = checkpoint.read(folder)
        before = Config.from_data(state["config"]).to_data()
        changed = [d for d in _differences(before, self.config.to_data()) if not d.startswith(MAY_CHANGE)]
        if changed:
            other = ", ".join(changed)
            raise UserError(f"{self.folder} holds a run with other settings ({other}); choose another folder with --out, or remove it")
        for name, role in self.method.roles.items():
            load_weights(role.module, tensors[name], folder)
        for name, module in self._averages().items():
            load_weights(module, tensors[name], folder)
        for name, optimizers in self.optimizers.items():
            for i, optimizer in enumerate(optimizers):
                checkpoint.restore_optimizer(optimizer, tensors[f"{name}.optimizer{i}"])
        self.step, self.loader.position, self.seconds = state["step"], state["position"], state["seconds"]
        self.moved = dict(state["moved"])
        self.guard.restore(state["guard"], self.device)
        self.chores.restore(state["chores"])


def _differences(before: object, after: object, name: str = "") -> list[str]:
    """Dotted names of the fields in which two stored configurations differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == after else [f"{name} was {before}, now {after}"]
