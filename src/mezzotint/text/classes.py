"""Classes instead of texts (DiT, Peebles & Xie 2023): a prompt is the name of a class or its number. Nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.errors import UserError, unknown
from mezzotint.models.cond import Cond
from mezzotint.text.encoder import TextConfig, TextEncoder


@dataclass
class ClassesConfig(TextConfig, kind="classes"):
    """names: one for each class in the order of their numbers; a class may have several with commas between them, or none, ""."""

    names: tuple[str, ...] = ()

    def build(self) -> "Classes":
        return Classes(self)


class Classes(TextEncoder):
    """Prompts -> Cond: label (B,), -1 for the empty prompt.

    Capitals do not matter. UserError for a number that there is not, for a name that no class has, and for one that several have.
    """

    here: Tensor

    def __init__(self, config: ClassesConfig) -> None:
        super().__init__()
        self.config = config
        self._numbers: dict[str, list[int]] = {}
        for number, names in enumerate(config.names):
            for name in filter(None, map(_plain, names.split(","))):
                self._numbers.setdefault(name, []).append(number)
        self.register_buffer("here", torch.zeros(0, device="cpu"), persistent=False)  # moves with the pipeline, and tells where it is

    def forward(self, prompts: Sequence[str]) -> Cond:
        return Cond.of_classes(torch.tensor([self.number(prompt) for prompt in prompts], dtype=torch.int64, device=self.here.device))

    def number(self, prompt: str) -> int:
        """The number of a class, -1 for the empty prompt."""
        name = _plain(prompt)
        if not name:
            return -1
        if name.isdecimal():
            if int(name) >= len(self.config.names):
                raise UserError(f"there is no class {name}: they have numbers from 0 to {len(self.config.names) - 1}")
            return int(name)
        if name not in self._numbers:
            raise unknown("class", name, self._numbers)
        if len(numbers := self._numbers[name]) > 1:
            raise UserError(f"several classes are called {prompt!r}: give one of their numbers, {', '.join(map(str, numbers))}")
        return numbers[0]

    def store(self, folder: Path) -> ClassesConfig:
        return self.config


def _plain(name: str) -> str:
    return name.strip().casefold()
