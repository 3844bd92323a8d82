"""What every text encoder is, for those who do not know which one they have."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from torch import nn

from mezzotint import config
from mezzotint.models.cond import Cond


class TextEncoder(nn.Module, ABC):
    """Prompts to the conditions of a denoiser. The empty prompt is the null condition, what guidance steps away from."""

    @abstractmethod
    def forward(self, prompts: Sequence[str]) -> Cond:
        """The conditions of B prompts."""

    @abstractmethod
    def store(self, folder: Path) -> "TextConfig":
        """Copy what the encoder needs beside its weights, if anything, into a pipeline's folder. Returns the description to store there."""


class TextConfig(config.Config, ABC, kind="text"):
    """Base of the text encoders' configurations."""

    @abstractmethod
    def build(self) -> TextEncoder:
        """The encoder."""

    def found_in(self, folder: Path) -> Self:
        """The description that was stored in a pipeline's folder, with the places of its files as seen from here."""
        return self
