"""Steps that must not happen: a loss or gradient that is not finite, or that leaps, is held back, reported, and traced to its cause.

Whether an update is sound is decided on the device, before it is made, and the host does not wait for the answer: optimizers take it
as a tensor (`optim.step_`). The host reads all answers since the last reading when it logs, and before anything looks at the weights
or stores them. Where the policy is to stop or to roll back, every update after a bad one is held back too. The weights are then still
those that met the bad batch when it is read, and since a step is a function of (seed, rank, step) it is made again, under watch.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint import config
from mezzotint.data.batch import Batch
from mezzotint.errors import Ending, UserError, is_memory
from mezzotint.methods.method import Metrics, Role, Turn

MOST_HELD = 16  # updates held back in a row, with the policy "skip", before that is an error
MOST_MOVED = 3  # batches that one step leaves out, with the policy "rollback", before that is one
SHOWN = 3  # samples in a message
LEAST_SPREAD = 0.01  # of the median: what a deviation is measured in where all recent values are alike


@dataclass
class GuardConfig(config.Config, kind="guard"):
    """What follows a bad step. policy: "stop" the run with a report; "skip" the update; "rollback" to the last checkpoint and go on
    from there without the batches of that step.

    deviations: a loss or gradient norm leaps when it is so many median absolute deviations above the median of the `window` last
    ones; 0: only numbers that are not finite are bad. No one number fits all: in sound runs of the tiny recipes the largest were 6
    in distillation and 230 in preference optimisation, whose gradients have a heavy tail.
    """

    policy: Literal["stop", "skip", "rollback"] = "stop"
    deviations: float = 0.0
    window: int = 128


class BadStepError(Ending):
    """A loss or gradient that ends the run. The message names the module, the time and the sample."""


class NonFiniteError(BadStepError):
    """It is not finite."""


class LeapError(BadStepError):
    """It is finite, and far above all recent ones."""


@dataclass(frozen=True)
class Place:
    """Where a step is in the data. position: of the loader before it. used: batches that it took."""

    step: int
    position: int
    used: int


@dataclass(frozen=True)
class Update:
    """An update of a role, the number-th turn of its step. infinite, leaps: () whether it is not finite, whether it leaps. values: (2,)
    loss and norm."""

    place: Place
    number: int
    turn: Turn
    role: str
    infinite: Tensor
    leaps: Tensor
    values: Tensor


@dataclass(frozen=True)
class Trouble:
    """An update that was held back."""

    place: Place
    number: int
    turn: Turn
    role: str
    finite: bool
    loss: float
    norm: float


@dataclass
class Guard:
    """Judges the updates of a run. Its whole memory is in `state`, so that a resumed run judges alike."""

    config: GuardConfig
    windows: dict[str, Tensor] = field(default_factory=dict)  # (2, window) last losses and norms of a role
    row: int = 0  # updates held back in a row
    pending: list[Update] = field(default_factory=list)
    tripped: Tensor | None = None

    def judge(self, place: Place, number: int, turn: Turn, role: str, loss: Tensor, norm: Tensor) -> Tensor:
        """() float32: one where the update of a role must not happen, else zero. Nothing is read from the device."""
        values = torch.stack([loss, norm]).float()
        infinite = ~values.isfinite().all()
        leaps = self._leaps(role, values, infinite) if self.config.deviations else infinite
        self.pending.append(Update(place, number, turn, role, infinite, leaps, values))
        held = infinite | leaps if self.config.deviations else infinite
        if self.config.policy != "skip":
            self.tripped = held = held if self.tripped is None else held | self.tripped
        return held.float()

    def _leaps(self, role: str, values: Tensor, infinite: Tensor) -> Tensor:
        """Whether a value is far above the window, which it then enters. A window that is not full has no median, and nothing leaps."""
        window = self.windows.get(role)
        if window is None:
            window = values.new_full((2, self.config.window), torch.nan)
        median = window.median(1, keepdim=True).values
        spread = (window - median).abs().median(1, keepdim=True).values.maximum(LEAST_SPREAD * median.abs())
        self.windows[role] = torch.where(infinite, window, torch.cat([window[:, 1:], values[:, None]], 1))
        return (values[:, None] > median + self.config.deviations * spread).any()

    def read(self) -> list[Trouble]:
        """The updates that were held back since the last reading, oldest first, where the policy is to skip; else the first one alone.

        This waits for the device. Raises BadStepError where too many in a row were skipped.
        """
        updates, self.pending, self.tripped = self.pending, [], None
        found = []
        for u, (infinite, leaps, loss, norm) in zip(updates, _verdicts(updates), strict=True):
            held = bool(infinite or leaps)
            self.row = self.row + 1 if held else 0
            if held:
                found.append(Trouble(u.place, u.number, u.turn, u.role, not infinite, loss, norm))
            if self.config.policy == "skip" and self.row > MOST_HELD:
                raise BadStepError(f"the last {self.row} updates up to step {u.place.step} were all skipped: {describe(found[-1])}")
        return found if self.config.policy == "skip" else found[:1]

    def state(self) -> dict[str, Any]:
        """JSON-ready; floats come back bit for bit."""
        return {"row": self.row, "windows": {role: window.tolist() for role, window in self.windows.items()}}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse of `state`."""
        self.row, self.pending, self.tripped = state["row"], [], None
        self.windows = {role: torch.tensor(window, device=device) for role, window in state["windows"].items()}


def _verdicts(updates: Sequence[Update]) -> list[list[float]]:
    """For every update whether it is not finite, whether it leaps, its loss and its norm, read from the device at once."""
    if not updates:
        return []
    bad = torch.stack([flag for u in updates for flag in (u.infinite, u.leaps)]).view(-1, 2)
    return torch.cat([bad.float(), torch.stack([u.values for u in updates])], 1).tolist()


def check_precision(roles: Mapping[str, Role]) -> None:
    """UserError where a trained weight is not float32: steps smaller than half of its last digit would be lost."""
    for role, part in roles.items():
        for name, p in part.module.named_parameters():
            if p.requires_grad and part.trained and p.dtype != torch.float32:
                kind = str(p.dtype).removeprefix("torch.")
                raise UserError(
                    f"{role}.{name} is {kind}, and trained weights must be float32; load them so, and compute in less precision"
                )


def check_loss(loss: Tensor, metrics: Metrics) -> None:
    """ValueError where a method's loss or times are not float32. Types are known to the host: this costs nothing."""
    for name, value in {"loss": loss, "t": metrics.get("t", loss)}.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{name} of a method must be float32, got {str(value.dtype).removeprefix('torch.')}")


@contextmanager
def enough_memory(changes: Sequence[str]) -> Iterator[None]:
    """Turns the end of memory into a UserError that says what needs less: changes of settings, the cheapest first."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        less = "; ".join([*changes, "smaller pictures or a smaller model"])
        raise UserError(
            f"a step needs more memory than there is ({str(error).splitlines()[0]}); what needs less, the cheapest first: {less} "
            "(mezzotint plan says how much less)"
        ) from error


def describe(trouble: Trouble) -> str:
    """What is wrong with an update, in words."""
    whose = "" if trouble.turn == ("student",) else f" of {'+'.join(trouble.turn)}"
    where = f"at step {trouble.place.step}"
    if trouble.finite:
        return f"the loss{whose} leaps {where}: {trouble.loss:.4g}, gradient norm {trouble.norm:.4g}"
    finite = torch.tensor(trouble.loss).isfinite()
    return f"the {'gradient' if finite else 'loss'}{whose} is not finite {where}"


def explain(
    trouble: Trouble,
    roles: Mapping[str, Role],
    batches: Sequence[Batch],
    compute: Callable[[int], tuple[Tensor, Metrics]],
    folder: Path,
    on_any: Callable[[bool], bool] = bool,
) -> BadStepError:
    """The error for a bad update, whose batches and whose report are stored in `folder`.

    compute(i) is the loss of batch i, computed again with the same weights and random numbers. Hooks watch it and its gradient, and
    give the first module in the order of computation whose output, or else whose output's gradient, is not finite.
    on_any: whether something is so on any rank; all ranks do the same work, since they share their weights.
    """
    computed = []
    watch = _Watch(roles)
    with watch:
        for index in range(len(batches)):
            watch.batch = index
            loss, metrics = compute(index)
            if not on_any(watch.first is not None):
                loss.backward()
            computed.append(metrics)
    if on_any(watch.first is not None) and watch.first is None and not trouble.finite:
        return NonFiniteError(f"{describe(trouble)}, for samples of another rank")
    if trouble.finite:
        index = max(range(len(batches)), key=lambda i: _losses(computed[i], len(batches[i])).max().item())
        rows = _losses(computed[index], len(batches[index])).argsort(descending=True).tolist()
        where = f"largest gradient in {_largest_gradient(roles)}"
    else:
        index = watch.first[1] if watch.first else 0
        rows = _bad_rows(batches[index], computed[index], watch.first[2] if watch.first else None)
        where = f"first in {watch.first[0] if watch.first else 'no module (the loss itself, or the sum of gradients)'}"
    batch, metrics = batches[index], computed[index]
    samples = ", ".join(f"{batch.ids[row]} ({batch.prompts[row]!r}{_time(metrics, row)})" for row in rows[:SHOWN])
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    message = f"{describe(trouble)}: {where}; samples {samples}{more}; the batch is in {folder}"
    _store(folder, message, batch, metrics, rows)
    return (LeapError if trouble.finite else NonFiniteError)(message)


class _Watch(ExitStack):
    """While entered, remembers the first module whose output or its gradient is not finite, with the batch and the tensor."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        super().__init__()
        self.first: tuple[str, int, Tensor] | None = None
        self.batch = 0
        for role, part in roles.items():
            for name, module in part.module.named_modules():
                if name:
                    self.callback(module.register_forward_hook(self._hook(f"{role}.{name}")).remove)

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                self._see(f"the output of {name}", output.detach())
                if output.requires_grad:
                    output.register_hook(lambda gradient: self._see(f"the gradient of the output of {name}", gradient))

        return hook

    def _see(self, what: str, tensor: Tensor) -> None:
        if self.first is None and not tensor.isfinite().all():
            self.first = what, self.batch, tensor


def _largest_gradient(roles: Mapping[str, Role]) -> str:
    norms = {
        f"{role}.{name}": float(p.grad.norm())
        for role, part in roles.items()
        for name, p in part.module.named_parameters()
        if p.grad is not None
    }
    return max(norms, key=norms.__getitem__, default="no module")


def _losses(metrics: Metrics, number: int) -> Tensor:
    """(B,) losses of the samples; zeros where a method does not tell them apart."""
    losses = metrics.get("loss", torch.zeros(number))
    return losses if losses.shape == (number,) else torch.zeros(number)


def _bad_rows(batch: Batch, metrics: Metrics, tensor: Tensor | None) -> list[int]:
    """The samples whose pictures, losses or place in the first bad tensor are not finite; all where single ones cannot be told."""
    bad = ~batch.images.isfinite().flatten(1).all(1).cpu()
    bad |= ~_losses(metrics, len(batch)).isfinite().cpu()
    if not bad.any() and tensor is not None and len(tensor) == len(batch):
        bad |= ~tensor.isfinite().flatten(1).all(1).cpu()
    rows = torch.nonzero(bad).flatten().tolist()
    return rows or list(range(len(batch)))


def _time(metrics: Metrics, row: int) -> str:
    return f", t = {float(metrics['t'][row]):.4f}" if "t" in metrics else ""


def _store(folder: Path, message: str, batch: Batch, metrics: Metrics, rows: list[int]) -> None:
    """The batch as tensors, and what is known of it as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"images": batch.images} | ({} if batch.rejected is None else {"rejected": batch.rejected})
    tensors |= {name: value for name, value in metrics.items() if value.ndim}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / "batch.safetensors")
    report = {"message": message, "bad_rows": rows, "ids": batch.ids, "prompts": batch.prompts}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
