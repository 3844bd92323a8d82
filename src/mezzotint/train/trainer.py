"""The one loop.

The Trainer owns what a technique need not know: optimizers, accumulation, clipping, averages, checkpoints, previews, the
held-out loss, the log, and stopping. Randomness of step k is a function of (seed, rank, k), so stopping at any step and
starting again is the same as never having stopped, bit for bit on one machine.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.progress import Progress
from torch import Tensor

from mezzotint import config
from mezzotint.config import Config
from mezzotint.data.batch import Batch, Loader, Source
from mezzotint.data.folder import FolderConfig
from mezzotint.data.pairs import PairsConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.method import MethodConfig, Metrics, Saved, Turn
from mezzotint.pictures import grid
from mezzotint.pipeline import Pipeline, PipelineConfig, load, load_weights
from mezzotint.train import checkpoint
from mezzotint.train.guard import explain
from mezzotint.train.heldout import heldout_loss
from mezzotint.train.log import Log
from mezzotint.train.optim import OptimConfig, average_, clip_
from mezzotint.train.stop import Stopped, StopRequest


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
    data: WorldsConfig | FolderConfig | PairsConfig = field(default_factory=WorldsConfig)
    method: MethodConfig = field(default_factory=DenoiseConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str = ""


class Trainer:
    """Trains one method in one folder; `run` starts, or goes on where the folder's last checkpoint is."""

    def __init__(self, config: RunConfig, folder: Path, source: Source | None = None, progress: Progress | None = None) -> None:
        self.config, self.folder, self.progress = config, folder, progress
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
        self.averages = {name: _frozen(role.module) for name, role in self.method.roles.items() if role.averaged}
        for role in self.method.roles.values():
            role.module.requires_grad_(False)
            role.module.train(role.trained)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that previews, evaluation and export see: the student's average where one is kept."""
        module = self.averages.get("student", self.method.student)
        assert isinstance(module, Pipeline)
        return module

    def run(self) -> Pipeline:
        """Train to the last step and export. Raises `Stopped` after a clean stop, `NonFiniteError` where numbers end."""
        self._open()
        log = Log(self.folder / "metrics.jsonl", self.step)
        task = self.progress.add_task(self.folder.name, total=self.config.train.steps, completed=self.step) if self.progress else None
        with StopRequest() as stop:
            while self.step < self.config.train.steps:
                start = time.perf_counter()
                metrics = self._train_step()
                self.step += 1
                self.seconds += time.perf_counter() - start
                self._chores(log, metrics, stop.asked)
                if self.progress and task is not None:
                    self.progress.update(task, completed=self.step)
                if stop.asked:
                    raise Stopped(f"stopped at step {self.step}")
        log.close()
        self.pipeline.save(self.folder / "export", getattr(torch, self.config.train.export))
        for name, module in self.averages.items():
            if name != "student" and isinstance(module, Saved):
                module.save(self.folder / "export" / name)
        return self.pipeline

    def _train_step(self) -> dict[str, float]:
        """One step of the method: all its turns. Returns the numbers to log."""
        logged: dict[str, float] = {}
        turns = self.method.turns(self.step)
        self._release(turns[0])  # which kernel a product takes depends on it: a roll-out is to have those of the loss, and of a resumed run
        self._seed(0)
        batches = [batch for _ in range(self.config.train.accumulate) for batch in self.method.experience(self.loader, self.step)]
        for number, turn in enumerate(turns, start=1):
            self._accumulate(batches, turn, number, logged)
            for name in turn:
                self._update(name, batches, turn, number, logged)
        self.method.after_step(self.step)
        return logged

    def _accumulate(self, batches: list[Batch], turn: Turn, number: int, logged: dict[str, float]) -> None:
        """Gradients of a turn: the mean over all samples of all batches."""
        samples = sum(len(batch) for batch in batches)
        means: dict[str, float] = {}
        self._release(turn)
        for index, batch in enumerate(batches):
            loss, metrics = self._loss(batch, turn, number, index)
            if not loss.isfinite():
                rerun = partial(self._loss, batch, turn, number, index)
                raise explain("the loss", self.step, self.method.roles, batch, metrics, rerun)
            share = len(batch) / samples
            (loss * share).backward()
            for key, value in {**metrics, "loss": loss.detach()}.items():
                key = key if len(turn) == 1 and turn[0] == "student" else f"{'+'.join(turn)}.{key}"
                if key != "t":
                    means[key] = means.get(key, 0.0) + share * float(value.mean())
        logged.update(means)  # of several turns of one role the last one's

    def _release(self, turn: Turn) -> None:
        """Let the roles of a turn have gradients, and no others."""
        for name, parameters in self.parameters.items():
            for p in parameters:
                p.requires_grad_(name in turn)

    def _loss(self, batch: Batch, turn: Turn, number: int, index: int) -> tuple[Tensor, Metrics]:
        self._seed(number, index)
        return self.method.loss(batch, turn, self.step)

    def _update(self, name: str, batches: list[Batch], turn: Turn, number: int, logged: dict[str, float]) -> None:
        """Clip, step the optimizers, move the average, and let go of the gradients of one role."""
        norm = clip_(self.parameters[name], self.config.optim.clip)
        if not norm.isfinite():
            rerun = partial(self._loss, batches[0], turn, number, 0)
            raise explain("the gradient", self.step, self.method.roles, batches[0], rerun()[1], rerun)
        logged["grad_norm" if name == "student" else f"{name}.grad_norm"] = float(norm)
        for optimizer in self.optimizers[name]:
            for group in optimizer.param_groups:
                group["lr"] = self.config.optim.rate(self.step, self.config.train.steps)
            optimizer.step()
            optimizer.zero_grad()
        if name in self.averages:
            average_(self.averages[name], self.method.roles[name].module, self.config.optim.average, self.step)

    def _seed(self, *place: int) -> None:
        """Seed all randomness of a call from (seed, rank, step, place in the step)."""
        mixed = 0
        for number in (self.config.train.seed, self.rank, self.step, *place):
            mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
        torch.manual_seed(mixed)

    def _chores(self, log: Log, metrics: dict[str, float], stopping: bool) -> None:
        """What is due after a step besides training."""
        every, step = self.config.train, self.step
        last = step == every.steps

        def due(interval: int) -> bool:
            return last or step % interval == 0

        if due(every.log):
            images = step * every.batch * every.accumulate
            rate = self.config.optim.rate(step - 1, every.steps)
            log.write(step, **metrics, lr=rate, images=images, seconds=round(self.seconds, 3))
        if due(every.evaluate):
            losses = heldout_loss(self.pipeline, self.source.held_out(every.held_out))
            log.write(step, held_out=float(losses.mean()), held_out_by_time=[round(float(x), 5) for x in losses])
        if every.preview_prompts and due(every.preview):
            self._preview()
        if due(every.checkpoint) or stopping:
            self._save()

    def _preview(self) -> None:
        """Draw the preview prompts through the pipeline, as `sample` does with the same prompts and seed 0."""
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        images = self.pipeline(self.config.train.preview_prompts)
        grid(images, columns=min(8, len(images))).save(folder / f"step-{self.step:08d}.png")

    def _save(self) -> None:
        tensors = {name: role.module.state_dict() for name, role in self.method.roles.items()}
        tensors |= {f"{name}.average": module.state_dict() for name, module in self.averages.items()}
        for name, optimizers in self.optimizers.items():
            tensors |= {f"{name}.optimizer{i}": checkpoint.optimizer_tensors(o) for i, o in enumerate(optimizers)}
        state = {"step": self.step, "position": self.loader.position, "seconds": self.seconds, "config": self.config.to_data()}
        checkpoint.write(self.folder / "checkpoints", self.step, tensors, state)

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

    def _restore(self, folder: Path) -> None:
        tensors, state = checkpoint.read(folder)
        before = Config.from_data(state["config"])
        if before != self.config:
            changed = ", ".join(_differences(state["config"], self.config.to_data()))
            raise UserError(f"{self.folder} holds a run with other settings ({changed}); choose another folder with --out, or remove it")
        for name, role in self.method.roles.items():
            load_weights(role.module, tensors[name], folder)
        for name, module in self.averages.items():
            load_weights(module, tensors[f"{name}.average"], folder)
        for name, optimizers in self.optimizers.items():
            for i, optimizer in enumerate(optimizers):
                checkpoint.restore_optimizer(optimizer, tensors[f"{name}.optimizer{i}"])
        self.step, self.loader.position, self.seconds = state["step"], state["position"], state["seconds"]


def _frozen(module: torch.nn.Module) -> torch.nn.Module:
    """A copy without gradients, for evaluation."""
    return copy.deepcopy(module).requires_grad_(False).eval()


def _differences(before: object, after: object, name: str = "") -> list[str]:
    """Dotted names of the fields in which two stored configurations differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == after else [f"{name} was {before}, now {after}"]
