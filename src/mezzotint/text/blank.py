"""Conditions that have a size and say nothing: what stands in for encoders that are not here, where only sizes matter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.models.cond import Cond
from mezzotint.text.encoder import TextConfig, TextEncoder


@dataclass
class BlankConfig(TextConfig, kind="blank"):
    """length: tokens of every prompt. width, pooled: of the features, 0 where there are none. layers, states: of a language model's."""

    length: int = 77
    width: int = 768
    pooled: int = 0
    layers: int = 0
    states: int = 0

    def build(self) -> "Blank":
        return Blank(self)


class Blank(TextEncoder):
    """B prompts -> Cond of zeros: text (B, L, D), pooled (B, D'), states (B, layers, L, D''), and a class and tokens, both numbered 0."""

    here: Tensor

    def __init__(self, config: BlankConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("here", torch.zeros(0), persistent=False)  # tells where the pipeline is

    def forward(self, prompts: Sequence[str]) -> Cond:
        c, rows = self.config, len(prompts)
        return Cond(
            text=self.here.new_zeros(rows, c.length, c.width),
            mask=None,
            pooled=self.here.new_zeros(rows, c.pooled),
            label=self.here.new_zeros(rows, dtype=torch.int64),
            states=self.here.new_zeros(rows, c.layers, c.length, c.states) if c.layers else None,
            tokens=self.here.new_zeros(rows, c.length, dtype=torch.int64),
        )

    def store(self, folder: Path) -> BlankConfig:
        return self.config
