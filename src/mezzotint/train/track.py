"""Trackers: the numbers and previews of a run, also where others look at them. The run's own `metrics.jsonl` is written in any case.

Each library is imported by the function that needs it, and told only what its own settings do not say: where wandb sends things, and
whether it does, is the matter of `wandb login` and WANDB_MODE; trackio is local unless TRACKIO_SPACE_ID says otherwise.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from mezzotint.config import Data
from mezzotint.errors import UserError

TrackerName = Literal["trackio", "wandb", "tensorboard"]
PROJECT = "mezzotint"
ID_FILE = "tracker.id"


class Tracker(Protocol):
    """What a tracker takes."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """A preview."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class Run:
    """A run of trackio or of wandb, which have one interface."""

    def __init__(self, library: Any, run: Any) -> None:
        self.library, self.run = library, run

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, path: Path) -> None:
        self.run.log({"preview": self.library.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        with Image.open(path) as image:
            self.writer.add_image("preview", np.array(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _trackio(folder: Path, step: int, config: Data) -> Tracker:
    import trackio

    run = trackio.init(PROJECT, _name(folder), config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    return Run(trackio, run)


def _wandb(folder: Path, step: int, config: Data) -> Tracker:
    import wandb

    return Run(wandb, wandb.init(project=PROJECT, name=_name(folder), config=config, dir=folder, id=_id(folder), resume="allow"))


def _tensorboard(folder: Path, step: int, config: Data) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoard(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))


TRACKERS: dict[TrackerName, Callable[[Path, int, Data], Tracker]] = {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}


def open_tracker(name: TrackerName, folder: Path, step: int, config: Data) -> Tracker:
    """The tracker of a run that is at a step. UserError where its library is not installed."""
    try:
        return TRACKERS[name](folder, step, config)
    except ImportError as error:
        raise UserError(f"--track {name} needs the package {name} ({error}); install it with: pip install {name}") from error


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by name, those in lists and dictionaries under "name/number" and "name/key"; what is no number is left out."""
    for name, value in values.items():
        if isinstance(value, (int, float)):
            yield prefix + name, float(value)
        elif isinstance(value, (list, tuple)):
            yield from flat({str(number): v for number, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")


def _name(folder: Path) -> str:
    return "-".join(folder.resolve().parts[-2:])


def _id(folder: Path) -> str:
    """A name that no other run has, the same whenever this one goes on."""
    path = folder / ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()
