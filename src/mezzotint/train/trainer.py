"""The one loop.

The Trainer owns what a technique need not know: optimizers, accumulation, clipping, averages, checkpoints, devices and ranks, what
follows a bad step, and stopping; what looks at a run is in `train.chores`. A step is made of `accumulate` micro-batches, which the
ranks share out, and the randomness of micro-batch m of step k is a function of (seed, k, m) alone. So stopping at any step and
starting again is the same as never having stopped, bit for bit on one machine, and any number of ranks trains the same model, up to
the order of sums. Where a run has stages (`train.stages`), the next one is entered between two steps, by the same call as on the way
back from a checkpoint.
"""

import copy
import json
import random
import time
from bisect import bisect_right
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn

from mezzotint import config
from mezzotint.config import Config
from mezzotint.data.batch import Batch, Loader, Source
from mezzotint.data.kinds import DataConfig
from mezzotint.data.mixture import Mixture, MixtureConfig
from mezzotint.data.rows import Rows, TableConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.locks import alone
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Saved, Turn
from mezzotint.models import lora
from mezzotint.pipeline import Pipeline, PipelineConfig, load, load_weights
from mezzotint.train import checkpoint, context
from mezzotint.train.average import FOLDER as AVERAGES
from mezzotint.train.average import Average
from mezzotint.train.chores import Chores
from mezzotint.train.evaluation import Best, EvaluationConfig
from mezzotint.train.fixed import Fixed
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
from mezzotint.train.parallel import ParallelConfig, Ranks, empty_copy, fetch_states_, gather, store_states_
from mezzotint.train.speed import Operations
from mezzotint.train.stages import StageConfig, become, changed
from mezzotint.train.stop import Stopped, StopRequest
from mezzotint.train.track import TrackerName, open_tracker
from mezzotint.weights.lora import write as write_adapter

LAST_WRITE = 30.0  # seconds that a run which breaks gives to the checkpoint that is being written


@dataclass
class TrainConfig(config.Config, kind="train"):
    """steps: how long. accumulate, batch: micro-batches of a step, over all ranks, and samples of each. keep: newest checkpoints kept,
    beside the one with the best evaluation. deadline: minutes after which a run saves and ends, 0 for none.

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

    def check(self) -> None:
        """UserError for a number that no run can have."""
        for name in ("steps", "batch", "accumulate", "log", "preview", "evaluate", "checkpoint", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class RunConfig(config.Config, kind="run"):
    """A whole training run. init: the pipeline to start from (see `pipeline.load`); empty: from scratch. stages: see `train.stages`.

    adapter: on the student's denoiser, which is then all that is trained of the student; rank 0 for none.
    """

    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=WorldsConfig)
    method: MethodConfig = field(default_factory=DenoiseConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapter: lora.LoRAConfig = field(default_factory=lambda: lora.LoRAConfig(rank=0))
    init: str = ""
    stages: tuple[StageConfig, ...] = ()

    def staged(self) -> list["RunConfig"]:
        """The run as it is in every stage, the last as its own fields say. UserError for stages and numbers that cannot be."""
        ends = self.ends()
        if self.stages and min(end - start for start, end in zip((0, *ends), ends, strict=False)) < 1:
            raise UserError(f"stages must have a step or more and end before the run, and they end after steps {', '.join(map(str, ends))}")
        staged = [changed(self, stage.changes) for stage in self.stages] + [self]
        for each in staged:
            each.train.check()
            each.optim.check()
        return staged

    def ends(self) -> list[int]:
        """The numbers of steps after which the stages end."""
        return [*accumulate(stage.steps for stage in self.stages), self.train.steps]

    def stage(self, step: int) -> int:
        """Which of the stages step 0, 1, ... is of."""
        return min(bisect_right(self.ends(), step), len(self.stages))


@dataclass(frozen=True)
class Portion:
    """A batch of a step: number `index` of those that micro-batch `micro` is made of."""

    micro: int
    index: int
    batch: Batch


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
        if isinstance(config.data, TableConfig | MixtureConfig):
            config = config.replace(data=config.data.pinned(folder))
        self.described, self.folder, self.track = config, folder, track
        self.stages, self.stage = config.staged(), 0
        self.config = copy.deepcopy(self.stages[0])  # of the stage: `_enter` changes it
        config = self.config
        self.ranks = Ranks(config.parallel)
        if self.ranks.context:
            context.check_methods(stage.method for stage in self.stages)
        self.micros, *_ = [self.ranks.share(stage.train.accumulate) for stage in self.stages]
        self.progress = progress if self.ranks.main else None
        self.step = 0
        self.seconds = 0.0
        self.moved: dict[int, int] = {}  # steps whose first batches are left out, and how many
        self.stop = StopRequest()
        self.method = made(config, self.ranks.device)
        self.given = source
        self.source = self._source()
        self.loader = Loader(self.source, config.train.batch, streams=config.train.accumulate, device=self.ranks.device)
        self.saver = checkpoint.Saver(folder / "checkpoints", self.ranks.rank, self.ranks.world, config.train.keep)
        self.guard = Guard(config.guard)
        self._prepare(self.method.roles)
        self.chores = Chores(self)

    def _prepare(self, roles: dict[str, Role]) -> None:
        """Averages, this rank's shares, optimizers and counters of the roles."""
        optim = self.config.optim
        for role in roles.values():
            role.module.to(self.ranks.device)
        check_precision(roles)
        self.fixed = Fixed(roles)
        self.averages = {name: Average(role.module, optim.average, optim.lengths) for name, role in roles.items() if role.averaged}
        self.unshared = {name: empty_copy(module) for name, module in self._shown().items()} if self.ranks.mesh else self._shown()
        self.ranks.spread(roles, self._averages().values())
        trained = {name: role.module for name, role in roles.items() if role.trained}
        named = {name: [(n, p) for n, p in module.named_parameters() if p.requires_grad] for name, module in trained.items()}
        self.parameters = {name: [p for _, p in pairs] for name, pairs in named.items()}
        self.blocks = {name: [block(n) for n, _ in pairs] for name, pairs in named.items()}
        self.optimizers = {name: optim.build(module) for name, module in trained.items()}
        self.released: Turn | None = None  # the turn whose roles may have gradients
        self.operations = Operations()
        for role in roles.values():
            if isinstance(role.module, Pipeline):
                self.operations.watch(role.module.denoiser, role.module.config.denoiser)
            role.module.requires_grad_(False).train(role.dropout)

    @property
    def images(self) -> int:
        """Samples that the steps so far have had, batch by batch."""
        ends = self.described.ends()
        steps = (max(0, min(self.step, end) - start) for start, end in zip((0, *ends), ends, strict=False))
        return sum(n * stage.train.batch * stage.train.accumulate for n, stage in zip(steps, self.stages, strict=True))

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that previews, evaluation and export see: the student's average where one is kept."""
        module = self._shown()["student"]
        assert isinstance(module, Pipeline)
        return module

    def whole(self, name: str = "student") -> nn.Module:
        """What others see of a role, with the weights of all ranks, which all call this; only rank 0 has the weights then.

        An adapter is merged: what is exported needs none.
        """
        if self.ranks.mesh:
            gather(self._shown()[name], self.unshared[name], self.ranks.main)
        module = self.unshared[name]
        if self.config.adapter.rank and self.ranks.main and isinstance(module, Pipeline):
            module = copy.deepcopy(module)
            lora.merge(module.denoiser)
        return module

    def run(self) -> Pipeline:
        """Train to the last step and export. Raises `Stopped` after a clean stop, `BadStepError` where numbers end.

        Of many ranks, all train, rank 0 writes, and only its pipeline has weights.
        """
        with alone(self.folder) if self.ranks.main else nullcontext():
            self._open()
            self._train()
            return self._export()

    def _train(self) -> None:
        """All steps that are left, with what is due between them."""
        chores, every = self.chores, self.config.train
        chores.open()
        if self.track and self.ranks.main:
            chores.tracker = open_tracker(self.track, self.folder, self.step, self.described.to_data())
        task = self.progress.add_task(self.folder.name, total=every.steps, completed=self.step) if self.progress else None
        self.stop = StopRequest(every.deadline)
        try:
            with closing(chores), closing(self.loader), self.stop, self.ranks.company():
                while self.step < every.steps and not chores.enough:
                    with enough_memory(self._cheaper()):
                        self._round()
                    if self.progress and task is not None:
                        self.progress.update(task, completed=self.step, note=chores.note)
        except Exception:
            with suppress(UserError):  # what broke the run is what is told
                self.saver.finish(LAST_WRITE)
            raise
        self.saver.finish()

    def _cheaper(self) -> list[str]:
        """Settings with which a step needs less memory, the cheapest first: those that `train.advice` tries in a plan."""
        train, parallel, changes = self.config.train, self.config.parallel, list[str]()
        if parallel.checkpoint != "full":
            changes.append("--parallel.checkpoint full")
        if train.batch % 2 == 0:
            changes.append(f"--train.batch {train.batch // 2} --train.accumulate {train.accumulate * 2}")
        if not self.config.adapter.rank:
            changes.append("--adapter.rank 16")
        if self.config.optim.name == "adamw":
            changes.append("--optim.name adamw8")
        return changes

    def _round(self) -> None:
        """A step and what is due after it; or, where it was bad and the policy is to roll back, the way back."""
        start = time.perf_counter()
        self.saver.check()
        metrics, stopping = self._train_step()
        self.step += 1
        sound = not (stopping or self.chores.any_due()) or self._examine()
        self.seconds += time.perf_counter() - start
        if not sound:
            return
        self._after_step(metrics, stopping)
        if stopping and self.step < self.config.train.steps:
            self.saver.finish()
            raise Stopped(f"stopped at step {self.step}", self.stop.by_hand)

    def _train_step(self) -> tuple[dict[str, Tensor], bool]:
        """One step of the method: all its turns. Returns the numbers to log, which are still on the device, and whether to stop."""
        logged: dict[str, Tensor] = {}
        turns = self.method.turns(self.step)
        self._release(turns[0])  # which kernel a product takes depends on it: a roll-out is to have those of the loss, and of a resumed run
        self.loader.position += self.moved.get(self.step, 0)
        place, portions = self._experience()
        agreed = self.ranks.agree(sum(len(p.batch) for p in portions), (len(portions), self.loader.position), self.stop.asked)
        for number, turn in enumerate(turns, start=1):
            loss = self._accumulate(portions, agreed.samples, turn, number, logged)
            for name in turn:
                self._update(name, place, turn, number, loss, logged)
        self.method.after_step(self.step)
        return logged, agreed.stop

    def _experience(self) -> tuple[Place, list[Portion]]:
        """What this rank learns from in this step, and where it is in the data.

        Every micro-batch takes equally many batches of its own stream.
        """
        portions, start, ends = [], self.loader.position, set()
        for micro in self.micros:
            self.loader.stream, self.loader.position = micro, start
            self._seed(micro, 0)
            with self.ranks.computing():
                batches = self.method.experience(self.loader, self.step)
            portions += [Portion(micro, index, batch) for index, batch in enumerate(batches)]
            ends.add(self.loader.position)
        if len(ends) > 1:
            raise ValueError(f"experience must take equally many batches for every micro-batch of a step, it ended at {sorted(ends)}")
        return Place(self.step, start, self.loader.position - start), portions

    def _accumulate(self, portions: list[Portion], samples: int, turn: Turn, number: int, logged: dict[str, Tensor]) -> Tensor:
        """Gradients of a turn: the mean over the samples of all batches, of which all ranks together have so many. Returns the loss."""
        prefix = "" if turn == ("student",) else f"{'+'.join(turn)}."
        self._release(turn)
        sums: dict[str, Tensor] = {}
        for portion in portions:
            loss, metrics = self._loss(portion, turn, number)
            check_loss(loss, metrics)
            share = len(portion.batch) / samples
            loss.backward(torch.full_like(loss, share))
            parts = {key: share * _mean(value.detach().float()) for key, value in {**metrics, "loss": loss}.items() if key != "t"}
            if not prefix and "t" in metrics and metrics["t"].shape == metrics.get("loss", loss).shape:
                self.chores.by_time.add(metrics["t"], metrics["loss"])
            sums = {key: sums[key] + part if key in sums else part for key, part in parts.items()}
        sums = self.ranks.total(sums)
        logged.update({prefix + key: value for key, value in sums.items()})
        return sums["loss"]

    def _release(self, turn: Turn) -> None:
        """Let the roles of a turn have gradients, and no others; nor have these their states at hand, where what is idle waits."""
        if turn == self.released:
            return
        self.released = turn
        for name, parameters in self.parameters.items():
            for p in parameters:
                p.requires_grad_(name in turn)
        if self.config.parallel.offload:
            for name in self.optimizers.keys() - set(turn):  # first: there may not be room for both
                store_states_(self.optimizers[name])
            for name in turn:
                fetch_states_(self.optimizers[name], self.ranks.device)

    def _loss(self, portion: Portion, turn: Turn, number: int) -> tuple[Tensor, Metrics]:
        self._seed(portion.micro, number, portion.index)
        with self.ranks.computing():
            return self.method.loss(portion.batch, turn, self.step)

    def _update(self, name: str, place: Place, turn: Turn, number: int, loss: Tensor, logged: dict[str, Tensor]) -> None:
        """Clip, step the optimizers unless the guard holds them, and move the average of one role."""
        norms = clip_(self.parameters[name], self.config.optim.clip)
        self.saver.settle()
        held = self.guard.judge(place, number, turn, name, loss, norms.total)
        logged["grad_norm" if name == "student" else f"{name}.grad_norm"] = norms.total
        self.chores.norms[name] = norms
        role = self.method.roles[name]
        for optimizer in self.optimizers[name]:
            step_(optimizer, role.rate * self.config.optim.rate(self.step, self.config.train.steps), held)
        if name in self.averages:
            self.averages[name].update(role.module, self.step)

    def _seed(self, micro: int, *place: int) -> None:
        """Seed all randomness of a call: torch's from (seed, micro-batch, step, place in the step), Python's without the micro-batch."""
        mixed = _mixed(self.config.train.seed, micro, self.step, *place)
        # As torch.manual_seed does, without asking every kind of device there could be, which takes it half a millisecond.
        torch.default_generator.manual_seed(mixed)
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(mixed)
        random.seed(_mixed(self.config.train.seed, self.step, *place))

    def _after_step(self, metrics: dict[str, Tensor], stopping: bool) -> None:
        """Chores, stored averages, and the checkpoint, as they are due. What looks at the weights sees the stage of the next step."""
        if self.step - 1 in self.moved:
            self.chores.write(moved=self.moved[self.step - 1])
        self.chores.tell(metrics)
        self._enter()
        self.chores.look()
        if self.config.optim.lengths and self.chores.due(self.config.optim.snapshot):
            for name, average in self.averages.items():
                average.store(self.folder / AVERAGES / name, self.step, self.ranks.main)
        if self.chores.due(self.config.train.checkpoint) or stopping or self.chores.enough:
            self._save()

    def _enter(self) -> None:
        """Go on in the stage of the next step, where that is another one. What is measured on other data is not compared with it."""
        stage = self.described.stage(self.step)
        if stage == self.stage:
            return
        before, now = self.stages[self.stage], self.stages[stage]
        self.stage = stage
        become(self.config, now)
        if now.data != before.data:
            self.source, self.chores.listed = self._source(), 0
        self.micros = self.ranks.share(now.train.accumulate)
        self.loader.go_on(self.source, now.train.batch, now.train.accumulate)
        self.guard.windows, self.chores.best = {}, Best()
        if now.pipeline.sampling != before.pipeline.sampling:
            for module in (self.method.student, *self._shown().values(), *self.unshared.values()):
                if isinstance(module, Pipeline):
                    module.config = replace(module.config, sampling=now.pipeline.sampling)

    def _source(self) -> Source:
        """The data of the stage."""
        ours = self.given is not None and self.config.data == self.described.data
        source = self.given if ours else self.config.data.build()
        assert source is not None
        if isinstance(source, Rows | Mixture):
            source.check(self.method.student)
        return source

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
        self.step = trouble.place.step
        self._enter()
        self.loader.position = trouble.place.position
        self._release(trouble.turn)
        _, portions = self._experience()
        batches = [portion.batch for portion in portions]
        again = lambda index: self._loss(portions[index], trouble.turn, trouble.number)  # noqa: E731
        folder = self.folder / "bad" / f"step-{self.step:08d}{self.ranks.suffix}"
        return explain(trouble, self.method.roles, batches, again, folder, self.ranks.any)

    def _roll_back(self, step: int, batches: int) -> None:
        """Go back to the last checkpoint, and let a step leave out so many batches when it comes again.

        A run that is killed before its next checkpoint meets the bad step again and does the same, so nothing need be stored here.
        """
        self.saver.finish()
        self.ranks.wait()
        self._restore(checkpoint.steps(self.folder / "checkpoints")[-1])
        self.moved[step] = batches
        self.chores.open()

    def _save(self) -> None:
        tensors = self.fixed.rest(self.method.roles, self._averages())
        for name, optimizers in self.optimizers.items():
            tensors[f"{name}.optimizer"] = checkpoint.optimizer_tensors(self.method.roles[name].module, optimizers)
        state: dict[str, Any] = {"step": self.step, "position": self.loader.position, "seconds": self.seconds}
        state |= {"guard": self.guard.state(), "chores": self.chores.state(), "moved": [*self.moved.items()]}
        state |= {"data": self.source.version, "fixed": self.fixed.fingerprint, "config": self.described.to_data()}
        self.saver.save(self.step, tensors, state, spare=[self.chores.best.step])

    def _shown(self) -> dict[str, nn.Module]:
        """What others see of the student and of all roles that have an average."""
        return {"student": self.method.student, **{name: average.shown for name, average in self.averages.items()}}

    def _averages(self) -> dict[str, nn.Module]:
        """All averages by the names that they have in checkpoints: student.average, student.average1, ..."""
        return {f"{n}.average{i or ''}": m for n, average in self.averages.items() for i, m in enumerate(average.modules)}

    def _export(self) -> Pipeline:
        """Write the pipeline that was trained, and what else is to be used by itself."""
        folder = self.folder / "export"
        modules = {name: self.whole(name) for name in self._shown()}
        student = modules["student"]
        assert isinstance(student, Pipeline)
        if self.ranks.main:
            student.save(folder, getattr(torch, self.config.train.export))
            for name, module in modules.items():
                if name != "student" and isinstance(module, Saved):
                    module.save(folder / name)
            if self.config.adapter.rank:
                adapted = self.unshared["student"]
                assert isinstance(adapted, Pipeline)
                write_adapter(folder / "adapter", lora.state(adapted.denoiser), student.config.denoiser, "peft")
        self.ranks.wait()
        return student

    def _open(self) -> None:
        """Make the run's folder, or go on from its last checkpoint."""
        folder = self.folder / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.ranks.main:
                checkpoint.clear(folder)
                if not checkpoint.steps(folder):
                    (self.folder / "config.json").write_text(json.dumps(self.described.to_data(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another folder with --out") from error
        self.ranks.wait()
        if found := checkpoint.steps(folder):
            self._restore(found[-1])
        elif self.config.guard.policy == "rollback":
            self._save()

    def _read(self, folder: Path) -> checkpoint.Checkpoint:
        """A checkpoint that every rank has found good, each a part of it. UserError on all of them where one has not."""
        try:
            saved, damage = checkpoint.Checkpoint(folder, slice(self.ranks.rank, None, self.ranks.world)), None
        except UserError as error:
            saved, damage = None, error
        if self.ranks.any(damage is not None) or saved is None:
            raise damage or UserError(f"checkpoint {folder} is damaged, as another rank says")
        return saved

    def _restore(self, folder: Path) -> None:
        saved = self._read(folder)
        self._check_settings(saved.state)
        self.step = saved.state["step"]
        self._enter()
        self._check_data(saved.state["data"])
        self.fixed.check(saved.state.get("fixed"), self.config.init, self.folder)
        tensors = self.fixed.rest(self.method.roles, self._averages())
        for name, optimizers in self.optimizers.items():
            module, group = self.method.roles[name].module, f"{name}.optimizer"
            tensors[group] = checkpoint.prepare_optimizers(module, optimizers, saved, group)
        saved.fill(tensors)
        self.released = None  # states are all at hand
        self.loader.position, self.seconds = saved.state["position"], saved.state["seconds"]
        self.moved = dict(saved.state["moved"])
        self.guard.restore(saved.state["guard"], self.ranks.device)
        self.chores.restore(saved.state["chores"])

    def _check_settings(self, state: dict[str, Any]) -> None:
        """UserError where a checkpoint is of another run. The machines may be others, the deadline, and what follows a bad step."""
        before = Config.from_data(state["config"])
        assert isinstance(before, RunConfig)
        wanted = self.described
        train = before.train.replace(deadline=wanted.train.deadline)
        now = before.replace(parallel=wanted.parallel, guard=wanted.guard, train=train)
        if now != wanted:
            others = ", ".join(_differences(now.to_data(), wanted.to_data()))
            raise UserError(f"{self.folder} holds a run with other settings ({others}); choose another folder with --out, or remove it")

    def _check_data(self, version: str) -> None:
        """UserError where the data of the stage are not those that the run saw before."""
        if version != self.source.version:
            raise UserError(
                f"the data are not those that {self.folder} was trained on (version {version}, now {self.source.version}); "
                "put them back, or choose another folder with --out"
            )


def made(config: RunConfig, device: torch.device | None = None) -> Method:
    """The method of a run before its first step, on the CPU unless told otherwise."""
    torch.manual_seed(config.train.seed)
    pipeline = _started(config)
    if config.adapter.rank:
        pipeline.requires_grad_(False)
        lora.add(pipeline.denoiser, config.adapter)
    return config.method.build(pipeline.to(device or "cpu"))


def _started(config: RunConfig) -> Pipeline:
    """The pipeline before the first step. UserError where `init` has weights of another architecture."""
    if not config.init:
        return config.pipeline.build()
    start = load(config.init).train()
    if start.config.replace(sampling=config.pipeline.sampling) == config.pipeline:  # nothing is in memory twice
        start.config = config.pipeline
        return start
    pipeline = config.pipeline.build()
    load_weights(pipeline, start.state_dict(), Path(config.init))
    return pipeline


def _mean(value: Tensor) -> Tensor:
    return value.mean() if value.ndim else value


def _mixed(*numbers: int) -> int:
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    return mixed


def _differences(before: object, after: object, name: str = "") -> list[str]:
    """Dotted names of the fields in which two stored configurations differ, with both values."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        before, after = (dict(enumerate(each)) for each in (before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == after else [f"{name} was {before}, now {after}"]
