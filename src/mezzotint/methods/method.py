"""The contract between a technique and the Trainer."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from mezzotint import config
from mezzotint.data.batch import Batch, Loader
from mezzotint.pipeline import Pipeline

Metrics = Mapping[str, Tensor]
Turn = tuple[str, ...]
M = TypeVar("M", bound=nn.Module)


@dataclass
class Role:
    """A part that a module plays in a method.

    trained: it has an optimizer. moved: it has none, and the method itself changes its weights after steps. What is neither stays as the
    method made it, and so does every weight that needed no gradient then, as the network under an adapter: `twin`s share it, and
    checkpoints do not have it. averaged: a moving average of its weights is kept, and it is the average that previews, evaluation and
    export see. One beside the student is exported to `export/ROLE` if it is `Saved`. dropout: it has its dropout while it trains: for
    losses that compare it with data; one that is compared with itself, or with a copy, must be the same network both times. rate: its
    learning rate, in units of the run's.
    """

    module: nn.Module
    trained: bool = True
    averaged: bool = False
    dropout: bool = False
    moved: bool = False
    rate: float = 1.0

    def fixed(self) -> dict[str, nn.Parameter]:
        """The weights that stay as they are, by all of their names; to be asked as the method has made them."""
        changes = self.trained or self.moved
        return {name: p for name, p in self.module.named_parameters(remove_duplicate=False) if not (changes and p.requires_grad)}


def twin(module: M) -> M:
    """A copy with the very weights of the original where they need no gradient: under an adapter it is as large as that."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})


@runtime_checkable
class Saved(Protocol):
    """A module that writes itself into a folder."""

    def save(self, folder: Path) -> None: ...


class Method(ABC):
    """All that the author of a technique must know. A method has a role called "student": the pipeline that it makes.

    Randomness comes from torch's global generator, which the Trainer seeds before every call from (seed, step, micro-batch), so
    a method draws freely, resumes exactly, and does not depend on the number of ranks. Which networks are called, and how
    often, must be the same for all micro-batches of a step: ranks that share a network gather it together. What decides that
    is drawn from Python's `random`, which the Trainer seeds from (seed, step).
    """

    roles: dict[str, Role]

    @property
    def student(self) -> Pipeline:
        """The pipeline in training."""
        return self.pipeline("student")

    def pipeline(self, name: str) -> Pipeline:
        """The pipeline that plays a role."""
        module = self.roles[name].module
        assert isinstance(module, Pipeline)
        return module

    def experience(self, loader: Loader, step: int) -> list[Batch]:
        """What one micro-batch of this step is: batches whose losses are averaged, weighted by their lengths.

        Asks the loader equally often for every micro-batch of a step.
        """
        return [next(loader)]

    def turns(self, step: int) -> Sequence[Turn]:
        """Which roles take an optimizer step, in order; those of one turn share one loss."""
        return [("student",)]

    @abstractmethod
    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        """The loss of a turn and what to log. Metrics of shape (B,) are per sample: "t" is the time, "loss" the loss."""

    def after_step(self, step: int) -> None:  # noqa: B027  # most methods have nothing to do here
        """Changes of the roles that are `moved`, after all turns of a step."""


class MethodConfig(config.Config, ABC, kind="method"):
    """Base of the methods' configurations."""

    @abstractmethod
    def build(self, pipeline: Pipeline) -> Method:
        """The method that trains `pipeline`."""
