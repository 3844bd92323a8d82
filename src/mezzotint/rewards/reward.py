"""What every reward is, for those who do not know which one they have."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mezzotint import config


class Reward(Protocol):
    """Scores of pictures; higher is better, and a picture's score does not depend on its neighbours."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of images (B, 3, H, W) in [-1, 1] of B prompts, on their device; differentiable in images where it can be."""
        ...


class RewardConfig(config.Config, ABC, kind="reward"):
    """Base of the rewards' configurations."""

    @abstractmethod
    def build(self) -> Reward:
        """The reward."""
