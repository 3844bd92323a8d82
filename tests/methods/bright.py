"""A reward with a gradient that any network can raise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezzotint.rewards import GoalConfig, RewardConfig


@dataclass
class BrightConfig(RewardConfig, kind="test_bright"):
    """How bright a picture is; it fails on prompts with a word."""

    fails_on: str = ""

    def build(self) -> Any:
        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            fails = torch.tensor([bool(self.fails_on) and self.fails_on in prompt for prompt in prompts])
            return torch.where(fails, math.nan, images.flatten(1).mean(1))

        return score


BRIGHT = GoalConfig(BrightConfig(), BrightConfig())
