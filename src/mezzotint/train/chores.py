"""What is due after a step besides training: the log, the held-out loss, evaluation, previews, the report page.

All ranks compute it together, since they share the weights, and come to the same ends; rank 0 writes it down.
"""

import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint.data.batch import Stored
from mezzotint.evals import rewards
from mezzotint.evals.report import Curve, Stage, render
from mezzotint.evals.students import Beside
from mezzotint.pictures import grid, png_bytes
from mezzotint.pipeline import Pipeline
from mezzotint.train.evaluation import Best, find, keep
from mezzotint.train.heldout import heldout_loss
from mezzotint.train.log import Log, LossByTime, on_host, peak_memory, read
from mezzotint.train.optim import Norms
from mezzotint.train.speed import matmul_rate
from mezzotint.train.track import Tracker, flat

if TYPE_CHECKING:
    from mezzotint.train.trainer import Trainer

LOG_FILE, REPORT_FILE = "metrics.jsonl", "report.html"
# What a line of the log has beside what the method told.
LOGGED = ("loss", "grad_norm", "lr", "seconds", "images_per_second", "loader_wait", "matmul_share", "memory_gb")


class Chores:
    """The chores of one run. What must survive a stop is in `state`."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.config = trainer, trainer.config
        self.tracker: Tracker | None = None
        self.log: Log | None = None
        self.by_time = LossByTime(trainer.ranks.total)
        self.best = Best()
        self.norms: dict[str, Norms] = {}
        self.drawn: dict[str, list[bytes]] = {}  # the newest previews: of the student, and of whom it is shown beside
        self.note = ""
        self.ends = frozenset(trainer.described.ends())
        self.listed = len(trainer.source.bad) if isinstance(trainer.source, Stored) else 0
        self.config.evaluation.compared_with(self.config.init)

    @property
    def enough(self) -> bool:
        """Whether training ends early, for want of better evaluations."""
        patience = self.config.evaluation.patience
        return patience > 0 and self.best.waited >= patience

    @cached_property
    def beside(self) -> Beside | None:
        """What the suite "students" compares with: drawn when it is first needed, and again after a stop."""
        evaluation = self.config.evaluation
        if evaluation.suite != "students":
            return None
        return evaluation.beside(self.config.init, self.trainer.pipeline, self.config.train.preview_prompts)

    def open(self) -> None:
        """Start or go on writing at the trainer's step."""
        if self.log is not None:
            self.log.close()
        if self.trainer.ranks.main:
            self.log = Log(self.trainer.folder / LOG_FILE, self.trainer.step)
        self.since = self._now()

    def write(self, **values: Any) -> None:
        """A line of the log, and of the tracker."""
        if self.trainer.described.stages:
            values = {"stage": self.trainer.stage, **values}
        if self.log is not None:
            self.log.write(self.trainer.step, **values)
        if self.tracker is not None:
            self.tracker.numbers(self.trainer.step, dict(flat(values)))

    def close(self) -> None:
        """Send what is left to the tracker."""
        if self.log is not None:
            self.log.close()
        if self.tracker is not None:
            self.tracker.close()

    def tell(self, metrics: Mapping[str, Tensor]) -> None:
        """Write down the numbers of a step, if that is due."""
        if self.due(self.config.train.log):
            self._log(metrics)
            self._list()

    def look(self) -> None:
        """Do what is due of all that looks at the weights."""
        every, evaluation = self.config.train, self.config.evaluation
        looked = False
        if self.due(every.evaluate):
            self._held_out()
            looked = True
        if evaluation.suite and self.due(evaluation.every):
            self._evaluate()
            looked = True
        if every.preview_prompts and (self.due(every.preview) or self.enough):
            self._preview()
            looked = True
        if looked and self.trainer.ranks.main:
            self._report()
        if looked:
            _give_back()

    def due(self, interval: int) -> bool:
        """Whether something that happens every so many steps, and at the end of a stage, happens now."""
        return self.trainer.step % interval == 0 or self.trainer.step in self.ends

    def any_due(self) -> bool:
        """Whether anything that looks at the weights or writes happens now."""
        every, evaluation = self.config.train, self.config.evaluation
        intervals = [every.log, every.evaluate, every.checkpoint]
        intervals += [every.preview] * bool(every.preview_prompts) + [evaluation.every] * bool(evaluation.suite)
        intervals += [self.config.optim.snapshot] * bool(self.config.optim.lengths)
        return any(map(self.due, intervals))

    def _now(self) -> tuple[float, ...]:
        """What speeds are differences of: images, seconds of training, seconds of waiting for data, operations of this rank."""
        trainer = self.trainer
        operations = trainer.operations.total / self.config.parallel.context
        return trainer.images, trainer.seconds, trainer.loader.waited, operations

    def _log(self, metrics: Mapping[str, Tensor]) -> None:
        """The numbers of the last step, and how fast the steps since the last line were."""
        trainer, every = self.trainer, self.config.train
        values = on_host(metrics)
        blocks = {name: norms.by(trainer.blocks[name]) for name, norms in self.norms.items()}
        now = self._now()
        images, seconds, waited, operations = (new - old for new, old in zip(now, self.since, strict=True))
        self.since = now
        speed = {
            "images_per_second": images / seconds,
            "loader_wait": waited / seconds,
            "matmul_share": operations / seconds / matmul_rate(trainer.ranks.device.type, getattr(torch, self.config.parallel.precision)),
            "memory_gb": peak_memory(trainer.ranks.device),
        }
        self.write(
            **values,
            lr=self.config.optim.rate(trainer.step - 1, every.steps),
            images=trainer.images,
            seconds=round(trainer.seconds, 3),
            loss_by_time=self.by_time.read(),
            grad_norm_by_block={f"{role}.{name}": _short(norm) for role, of in blocks.items() for name, norm in of.items()},
            **{name: _short(value) for name, value in speed.items()},
        )
        loss = f"loss {values['loss']:.4g}  " if "loss" in values else ""
        self.note = f"{loss}{speed['images_per_second']:.3g} images/s  {speed['matmul_share']:.0%} of matmul  {speed['memory_gb']:.3g} GB"

    def _list(self) -> None:
        """What this rank found unusable in the data since the last time."""
        if isinstance(self.trainer.source, Stored) and (found := self.trainer.source.bad[self.listed :]):
            self.listed += len(found)
            self.write(set_aside=[vars(bad) for bad in found])

    def _held_out(self) -> None:
        losses = heldout_loss(self.trainer.pipeline, self.trainer.source.held_out(self.config.train.held_out))
        loss = float(losses.mean())
        self.write(held_out=loss, held_out_by_time=[round(float(x), 5) for x in losses])
        if self.config.evaluation.best == "held_out":
            self._compare(loss)

    def _evaluate(self) -> None:
        """A suite of `evals`; its numbers are those of an offline evaluation of the same weights."""
        evaluation = self.config.evaluation
        start = time.perf_counter()
        result = evaluation.measure(self.trainer.pipeline, self.trainer.source, self.beside)
        self.write(evaluation=result, evaluation_seconds=round(time.perf_counter() - start, 3))
        if evaluation.best and evaluation.best != "held_out":
            self._compare(find(result, evaluation.best))

    def _compare(self, value: float) -> None:
        name = self.config.evaluation.best
        if self.best.beaten(name, value, self.trainer.step):
            pipeline = self.trainer.whole()
            assert isinstance(pipeline, Pipeline)
            if self.trainer.ranks.main:
                keep(pipeline, self.trainer.folder / "export-best", name, self.best)
        if self.enough:
            self.write(enough=f"no better {name} than {self.best.value:.5g} of step {self.best.step} in {self.best.waited} evaluations")

    def _preview(self) -> None:
        """Draw the preview prompts through the pipeline, as `sample` does with the same prompts and seed 0."""
        folder = self.trainer.folder / "previews"
        images, others = self.trainer.pipeline(self.config.train.preview_prompts), self._others()
        if not self.trainer.ranks.main:
            return
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self.trainer.step:08d}.png"
        grid(images, columns=min(8, len(images))).save(path)
        self.drawn = {who: _pngs(shown) for who, shown in {"student": images, **others}.items()}
        if self.tracker is not None:
            self.tracker.picture(self.trainer.step, path)

    def _others(self) -> dict[str, Tensor]:
        """The preview prompts drawn, from the noise of the student's, by its teacher, and by a critic that is a pipeline (fake score)."""
        if self.beside is None or self.beside.shown is None:
            return {}
        roles = self.trainer.method.roles
        critic = roles["critic"].module if "critic" in roles else None
        if not isinstance(critic, Pipeline):
            return {"teacher": self.beside.shown}
        settings = self.beside.sampling.replace(guidance=1.0)
        return {"teacher": self.beside.shown, "critic": critic(self.config.train.preview_prompts, settings=settings)}

    def _report(self) -> None:
        """The page of the run as it stands."""
        folder, lines = self.trainer.folder, read(self.trainer.folder / LOG_FILE)
        prompts = list(self.config.train.preview_prompts) if self.drawn else []
        evaluations = [line["evaluation"] for line in lines if "evaluation" in line]
        scores = {name: value for name, value in (evaluations or [{}])[-1].items() if isinstance(value, float)}
        best = {} if self.best.value is None else {f"best {self.config.evaluation.best}": f"{self.best.value:.5g} at step {self.best.step}"}
        stages = len(self.trainer.stages)
        place = {"stage": f"{self.trainer.stage + 1} of {stages}"} if stages > 1 else {}
        stage = Stage(
            name=folder.name,
            title=f"{self.config.method.kind}, step {self.trainer.step} of {self.config.train.steps}",
            scores=scores,
            curve=[(line["step"], line["loss"]) for line in lines if "loss" in line],
            held_out_curve=[(line["step"], line["held_out"]) for line in lines if "held_out" in line],
            images=self.drawn.get("student", []),
            notes={"training": f"{self.trainer.seconds:.0f} s", "last step": self.note, **place, **best, **rewards.told(lines)},
            more=_curves(lines),
        )
        found = {} if self.beside is None else {"teacher": self.beside.found}
        others = [
            Stage(who, who, found.get(who, {}), [(line["step"], line[key]) for line in lines if key in line], [], images, {})
            for who, images in self.drawn.items()
            if (key := f"{who}.loss") != "student.loss"
        ]
        _replace(folder / REPORT_FILE, render(f"Run {folder.name}", [stage, *others], prompts, {"folder": str(folder)}))

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"best": self.best.state(), "by_time": self.by_time.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.best = Best(**state["best"])
        self.by_time.restore(state["by_time"], self.trainer.ranks.device)


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """What the method and the evaluations told beside the loss, over the steps, wherever there are two numbers or more."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        told = (
            {name: value for name, value in line.items() if name not in LOGGED and not name.endswith(".grad_norm")} if "lr" in line else {}
        )
        for name, value in {**told, **line.get("evaluation", {})}.items():
            if isinstance(value, float):
                curves.setdefault(name, []).append((line["step"], value))
    return {name: curve for name, curve in curves.items() if len(curve) > 1}


def _pngs(images: Tensor) -> list[bytes]:
    return [png_bytes(image) for image in images]


def _short(value: float) -> float:
    """Four digits: more would only fill the log."""
    return float(f"{value:.4g}")


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _give_back() -> None:
    """Memory that an evaluation took and training cannot use goes back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
