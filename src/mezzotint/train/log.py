"""The diary of a run: one JSON object per line; and the numbers of steps on their way there, on the device until they are written."""

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BINS = 10
MOST_WAITING = 64  # batches whose losses are kept before they are added up: there may be many from one line to the next


class Log:
    """`metrics.jsonl` of a run. Opened at a step, it forgets what a killed run had written beyond it."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read(path) if line["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, path)
        self.file = path.open("a", buffering=1)

    def write(self, step: int, **values: Any) -> None:
        """Add a line."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out. An absent file has none."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers that were on the device, all at once."""
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True)) if values else {}


def by_time(t: Tensor, loss: Tensor) -> Tensor:
    """(2, BINS) float64: sums of losses and numbers of samples in each tenth of (B,) times in [0, 1]. Nothing is read from the device."""
    inside = (t * BINS).long().clamp(0, BINS - 1) == torch.arange(BINS, device=t.device)[:, None]
    return torch.stack([torch.where(inside, loss.double(), 0).sum(1), inside.sum(1).double()])


class LossByTime:
    """The mean loss in each tenth of the times of training since it was last read: one mean hides where a loss goes up.

    A step only keeps what it has; sums of many steps are made at once. total: of numbers over all ranks, which read at the same steps.
    """

    def __init__(self, total: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict) -> None:
        self.total = total
        self.sums: Tensor | None = None  # (2, BINS): losses, samples of all ranks
        self.waiting: list[tuple[Tensor, Tensor]] = []  # times and losses of this rank
        self.own: Tensor | None = None  # sums of what has waited

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Take in (B,) losses at times in [0, 1]. Nothing is read from the device."""
        self.waiting.append((t, loss.detach()))
        if len(self.waiting) == MOST_WAITING:
            self._add_up()

    def _add_up(self) -> None:
        if self.waiting:
            sums = by_time(*map(torch.cat, zip(*self.waiting, strict=True)))
            self.own = sums if self.own is None else self.own + sums
            self.waiting = []

    def _meet(self) -> None:
        """Put together what all ranks have."""
        self._add_up()
        if self.own is not None:
            sums = self.total({"": self.own})[""]
            self.sums, self.own = sums if self.sums is None else self.sums + sums, None

    def read(self) -> list[float | None]:
        """BINS means, None where no sample was; empty where no method told times. Forgets them."""
        self._meet()
        losses, samples = ([], []) if self.sums is None else self.sums.tolist()
        self.sums = None
        return [float(f"{loss / n:.4g}") if n else None for loss, n in zip(losses, samples, strict=True)]

    def state(self) -> list[list[float]] | None:
        """JSON-ready."""
        self._meet()
        return None if self.sums is None else self.sums.tolist()

    def restore(self, state: list[list[float]] | None, device: torch.device) -> None:
        """The inverse of `state`."""
        self.waiting, self.own = [], None
        self.sums = None if state is None else torch.tensor(state, device=device, dtype=torch.float64)


def peak_memory(device: torch.device) -> float:
    """The most memory in GB that was in use: of the device, or of the process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)
