"""The one loop.

The Trainer owns what a technique need not know: optimizers, accumulation, clipping, averages, checkpoints, previews, the
held-out loss, the log, and stopping. A step is made of `accumulate` micro-batches, which the ranks share out, and the
randomness of micro-batch m of step k is a function of (seed, k, m) alone. So stopping at any step and starting again is the same as
never having stopped, bit for bit on one machine, and any number of ranks trains the same model, up to the order of sums.
"""

import copy
import json
import math
import random
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from mezzotint.train.guard import NonFiniteError, explain
from mezzotint.train.heldout import heldout_loss
from mezzotint.train.log import Log
from mezzotint.train.optim import OptimConfig, average_, clip_
from mezzotint.train.parallel import ParallelConfig, Ranks, empty_copy, gather, whole
from mezzotint.train.stop import Stopped, StopRequest

LAST_WRITE = 30.0  # seconds that a run which breaks gives to the checkpoint that is being written


@dataclass
class TrainConfig(config.Config, kind="train"):
    """steps: how long. accumulate, batch: micro-batches of a step, over all ranks, and samples of each. keep: newest checkpoints kept,
    beside the one with the best held-out loss. deadline: minutes after which a run saves and ends, 0 for none.

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
    keep: int = 2
    deadline: float = 0.0
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init: str = ""


@dataclass(frozen=True)
class Portion:
    """A batch of a step: number `index` of those that micro-batch `micro` is made of."""

    micro: int
    index: int
    batch: Batch


class Trainer:
    """Trains one method in one folder; `run` starts, or goes on where the folder's last checkpoint is."""

    def __init__(self, config: RunConfig, folder: Path, source: Source | None = None, progress: Progress | None = None) -> None:
        self.config, self.folder = config, folder
        self.ranks = Ranks(config.parallel)
        self.micros = self.ranks.share(config.train.accumulate)
        self.progress = progress if self.ranks.main else None
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, float] = {}
        self.stop = StopRequest()
        torch.manual_seed(config.train.seed)
        pipeline = config.pipeline.build()
        if config.init:
            load_weights(pipeline, load(config.init).state_dict(), Path(config.init))
        self.method = config.method.build(pipeline)
        self.source = source or config.data.build()
        self.loader = Loader(self.source, config.train.batch, streams=config.train.accumulate)
        self.saver = checkpoint.Saver(folder / "checkpoints", self.ranks.rank, self.ranks.world, config.train.keep)
        self.averages = {name: _frozen(role.module) for name, role in self.method.roles.items() if role.averaged}
        self.unshared = empty_copy(self.pipeline) if self.ranks.world > 1 else self.pipeline
        for role in self.method.roles.values():
            self.ranks.spread(role)
        for module in self.averages.values():
            self.ranks.spread_average(module)
        trained = {name: role for name, role in self.method.roles.items() if role.trained}
        self.parameters = {name: [p for p in role.module.parameters() if p.requires_grad] for name, role in trained.items()}
        self.optimizers = {name: config.optim.build(role.module) for name, role in trained.items()}
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
        """Train to the last step and export. Raises `Stopped` after a clean stop, `NonFiniteError` where numbers end.

        Of many ranks, all train, rank 0 writes, and only its pipeline has weights.
        """
        self._open()
        log = Log(self.folder / "metrics.jsonl", self.step) if self.ranks.main else None
        task = self.progress.add_task(self.folder.name, total=self.config.train.steps, completed=self.step) if self.progress else None
        self.stop = StopRequest(self.config.train.deadline)
        try:
            with self.stop:
                while self.step < self.config.train.steps:
                    start = time.perf_counter()
                    self.saver.check()
                    metrics, stopping = self._train_step()
                    self.step += 1
                    self.seconds += time.perf_counter() - start
                    self._chores(log, metrics, stopping)
                    if self.progress and task is not None:
                        self.progress.update(task, completed=self.step)
                    if stopping and self.step < self.config.train.steps:
                        self.saver.finish()
                        raise Stopped(f"stopped at step {self.step}", self.stop.by_hand)
        except Exception:
            self.saver.finish(LAST_WRITE)
            raise
        self.saver.finish()
        if log is not None:
            log.close()
        return self._export()

    def _train_step(self) -> tuple[dict[str, float], bool]:
        """One step of the method: all its turns. Returns the numbers to log, and whether the run was asked to stop after it."""
        logged: dict[str, float] = {}
        turns = self.method.turns(self.step)
        self._release(turns[0])  # which kernel a product takes depends on it: a roll-out is to have those of the loss, and of a resumed run
        portions = self._experience()
        samples = sum(len(portion.batch) for portion in portions)
        agreed = self.ranks.agree(samples, (len(portions), self.loader.position), self.stop.asked)
        for number, turn in enumerate(turns, start=1):
            suspect = self._accumulate(portions, agreed.samples, turn, number, logged)
            for name in turn:
                self._update(name, suspect, turn, number, logged)
        self.method.after_step(self.step)
        return logged, agreed.stop or (self.ranks.world == 1 and self.stop.asked)

    def _experience(self) -> list[Portion]:
        """What this rank learns from in this step. Every micro-batch takes equally many batches of its own stream of the data."""
        portions, start, ends = [], self.loader.position, set()
        for micro in self.micros:
            self.loader.stream, self.loader.position = micro, start
            self._seed(micro, 0)
            with self.ranks.autocast():
                batches = self.method.experience(self.loader, self.step)
            portions += [Portion(micro, index, batch) for index, batch in enumerate(batches)]
            ends.add(self.loader.position)
        if len(ends) > 1:
            raise ValueError(f"experience must take equally many batches for every micro-batch of a step, it ended at {sorted(ends)}")
        return portions

    def _accumulate(self, portions: list[Portion], samples: int, turn: Turn, number: int, logged: dict[str, float]) -> Portion:
        """Gradients of a turn: the mean over the samples of all batches, of which all ranks together have so many.

        Returns what to look at first if they are not finite.
        """
        self._release(turn)
        suspect = portions[0]
        means: dict[str, float] = {}
        for portion in portions:
            loss, metrics = self._loss(portion, turn, number)
            if not loss.isfinite():
                suspect = portion
                if self.ranks.world == 1:  # of several ranks none may stop alone: the gradient tells all of them
                    raise self._not_finite("the loss", portion, turn, number, metrics)
            share = len(portion.batch) / samples
            (loss * share).backward()
            for key, value in {**metrics, "loss": loss.detach()}.items():
                key = key if len(turn) == 1 and turn[0] == "student" else f"{'+'.join(turn)}.{key}"
                if key != "t":
                    means[key] = means.get(key, 0.0) + share * float(value.mean())
        logged.update(self.ranks.total(means))
        return suspect

    def _release(self, turn: Turn) -> None:
        """Let the roles of a turn have gradients, and no others."""
        for name, parameters in self.parameters.items():
            for p in parameters:
                p.requires_grad_(name in turn)

    def _loss(self, portion: Portion, turn: Turn, number: int) -> tuple[Tensor, Metrics]:
        self._seed(portion.micro, number, portion.index)
        with self.ranks.autocast():
            return self.method.loss(portion.batch, turn, self.step)

    def _update(self, name: str, suspect: Portion, turn: Turn, number: int, logged: dict[str, float]) -> None:
        """Clip, step the optimizers, move the average, and let go of the gradients of one role."""
        norm = whole(clip_(self.parameters[name], self.config.optim.clip))
        if not norm.isfinite():
            loss, metrics = self._loss(suspect, turn, number)
            mine = float(not loss.isfinite())
            if self.ranks.total({"found": mine})["found"] > mine == 0:
                self._loss(suspect, turn, number)  # another rank looks for the module, and cannot compute alone
                raise NonFiniteError(f"the loss is not finite at step {self.step}, for samples of another rank")
            raise self._not_finite("the loss" if mine else "the gradient", suspect, turn, number, metrics)
        logged["grad_norm" if name == "student" else f"{name}.grad_norm"] = float(norm)
        for optimizer in self.optimizers[name]:
            for group in optimizer.param_groups:
                group["lr"] = self.config.optim.rate(self.step, self.config.train.steps)
            optimizer.step()
            optimizer.zero_grad()
        if name in self.averages:
            average_(self.averages[name], self.method.roles[name].module, self.config.optim.average, self.step)

    def _not_finite(self, what: str, portion: Portion, turn: Turn, number: int, metrics: Metrics) -> NonFiniteError:
        rerun = partial(self._loss, portion, turn, number)
        return explain(what, self.step, self.method.roles, portion.batch, metrics, rerun)

    def _seed(self, micro: int, *place: int) -> None:
        """Seed all randomness of a call: torch's from (seed, micro-batch, step, place in the step), Python's without the micro-batch."""
        torch.manual_seed(_mixed(self.config.train.seed, micro, self.step, *place))
        random.seed(_mixed(self.config.train.seed, self.step, *place))

    def _chores(self, log: Log | None, metrics: dict[str, float], stopping: bool) -> None:
        """What is due after a step besides training. All ranks compute it together, and the one with a log writes it down."""
        every, step = self.config.train, self.step
        last = step == every.steps

        def due(interval: int) -> bool:
            return last or step % interval == 0

        if log is not None and due(every.log):
            images = step * every.batch * every.accumulate
            rate = self.config.optim.rate(step - 1, every.steps)
            log.write(step, **metrics, lr=rate, images=images, seconds=round(self.seconds, 3))
        if due(every.evaluate):
            losses = heldout_loss(self.pipeline, self.source.held_out(every.held_out))
            if log is not None:
                log.write(step, held_out=float(losses.mean()), held_out_by_time=[round(float(x), 5) for x in losses])
            if due(every.checkpoint) and float(losses.mean()) < self.best.get("held_out", math.inf):
                self.best = {"step": step, "held_out": float(losses.mean())}
        if every.preview_prompts and due(every.preview):
            self._preview()
        if due(every.checkpoint) or stopping:
            self._save()

    def _preview(self) -> None:
        """Draw the preview prompts through the pipeline, as `sample` does with the same prompts and seed 0."""
        folder = self.folder / "previews"
        images = self.pipeline(self.config.train.preview_prompts)
        if self.ranks.main:
            folder.mkdir(exist_ok=True)
            grid(images, columns=min(8, len(images))).save(folder / f"step-{self.step:08d}.png")

    def _save(self) -> None:
        tensors = {name: role.module.state_dict() for name, role in self.method.roles.items()}
        tensors |= {f"{name}.average": module.state_dict() for name, module in self.averages.items()}
        for name, optimizers in self.optimizers.items():
            tensors[f"{name}.optimizer"] = checkpoint.optimizer_tensors(self.method.roles[name].module, optimizers)
        state = {"step": self.step, "position": self.loader.position, "seconds": self.seconds, "best": self.best}
        state |= {"data": self.source.version, "config": self.config.to_data()}
        self.saver.save(self.step, tensors, state, spare=[int(self.best["step"])] if self.best else [])

    def _export(self) -> Pipeline:
        """Write the pipeline that was trained, with the weights of all ranks."""
        if self.ranks.world > 1:
            gather(self.pipeline, self.unshared, self.ranks.main)
        assert isinstance(self.unshared, Pipeline)
        if self.ranks.main:
            self.unshared.save(self.folder / "export", getattr(torch, self.config.train.export))
        self.ranks.wait()
        return self.unshared

    def _open(self) -> None:
        """Make the run's folder, or go on from its last checkpoint."""
        folder = self.folder / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.ranks.main:
                checkpoint.clear(folder)
                if not checkpoint.steps(folder):
                    (self.folder / "config.json").write_text(json.dumps(self.config.to_data(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another folder with --out") from error
        self.ranks.wait()
        if found := checkpoint.steps(folder):
            self._restore(checkpoint.Checkpoint(found[-1], thorough=self.ranks.main))

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self._check_settings(saved.state)
        tensors = {name: role.module.state_dict() for name, role in self.method.roles.items()}
        tensors |= {f"{name}.average": module.state_dict() for name, module in self.averages.items()}
        for name, optimizers in self.optimizers.items():
            module, group = self.method.roles[name].module, f"{name}.optimizer"
            tensors[group] = checkpoint.prepare_optimizers(module, optimizers, saved.shapes.get(group, {}))
        saved.fill(tensors)
        self.step, self.loader.position, self.seconds = saved.state["step"], saved.state["position"], saved.state["seconds"]
        self.best = saved.state["best"]

    def _check_settings(self, state: dict[str, Any]) -> None:
        """UserError where a checkpoint is of another run. The machines may be others, and the deadline."""
        before = Config.from_data(state["config"])
        assert isinstance(before, RunConfig)
        train = before.train.replace(deadline=self.config.train.deadline)
        now = before.replace(parallel=self.config.parallel, train=train)
        if now != self.config:
            changed = ", ".join(_differences(now.to_data(), self.config.to_data()))
            raise UserError(f"{self.folder} holds a run with other settings ({changed}); choose another folder with --out, or remove it")
        if state["data"] != self.source.version:
            raise UserError(
                f"the data are not those that {self.folder} was trained on (version {state['data']}, now {self.source.version}); "
                "put them back, or choose another folder with --out"
            )


def _mixed(*numbers: int) -> int:
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    return mixed


def _frozen(module: torch.nn.Module) -> torch.nn.Module:
    """A copy without gradients, for evaluation."""
    return copy.deepcopy(module).requires_grad_(False).eval()


def _differences(before: object, after: object, name: str = "") -> list[str]:
    """Dotted names of the fields in which two stored configurations differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == after else [f"{name} was {before}, now {after}"]
