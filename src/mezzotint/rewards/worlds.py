"""What the judge of Worlds says of pictures, as rewards. None has a gradient, and none can be deceived."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mezzotint.rewards.reward import Reward, RewardConfig
from mezzotint.worlds import judge


@dataclass
class JudgeConfig(RewardConfig, kind="judge"):
    """1 where a picture shows what its prompt says and nothing else, else 0. Raises ValueError for a prompt that is no caption."""

    def build(self) -> Reward:
        return _judge


@dataclass
class CreditConfig(RewardConfig, kind="credit"):
    """The judge with partial credit, between 0 and 1: a student who is mostly wrong learns more from it. ValueError as `JudgeConfig`."""

    def build(self) -> Reward:
        return _credit


@dataclass
class PreferenceConfig(RewardConfig, kind="preference"):
    """How much of the preferred look a picture has, whatever its prompt: 0, 1/3, 2/3 or 1; 0 where it shows no scene."""

    def build(self) -> Reward:
        return _preference


def _judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return judge.score(images, prompts).to(images.device)


def _credit(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return judge.credit(images, prompts).to(images.device)


def _preference(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return judge.preference(images).mean(1).to(images.device)
