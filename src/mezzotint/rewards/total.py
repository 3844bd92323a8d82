"""Several rewards as one: a weighted sum of standardised scores.

    r = sum_k w_k (r_k - mean_k) / std_k

The means and deviations are fixed numbers, measured once (`measured`) or published, not those of a batch: a picture's score then
does not depend on its neighbours, and is the same at the end of a run as at its start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint import config
from mezzotint.flow.domain import above
from mezzotint.rewards.reward import Reward, RewardConfig
from mezzotint.rewards.worlds import JudgeConfig


@dataclass
class PartConfig(config.Config, kind="reward_part"):
    """One term: a reward, its weight, and the mean and deviation of its scores. ValueError for std <= 0."""

    reward: RewardConfig = field(default_factory=JudgeConfig)
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        above(0, std=self.std)


@dataclass
class TotalConfig(RewardConfig, kind="total"):
    """The sum of `parts`. ValueError for none."""

    parts: tuple[PartConfig, ...] = field(default_factory=lambda: (PartConfig(),))

    def build(self) -> Reward:
        if not self.parts:
            raise ValueError("parts must be at least one reward, got none")
        terms = [(part.reward.build(), part) for part in self.parts]

        def total(images: Tensor, prompts: Sequence[str]) -> Tensor:
            scores = [part.weight * (reward(images, prompts) - part.mean) / part.std for reward, part in terms]
            return torch.stack(scores).sum(0)

        return total


def measured(part: PartConfig, images: Tensor, prompts: Sequence[str]) -> PartConfig:
    """The part with the mean and deviation that its reward has on these pictures. ValueError where all scores are one."""
    with torch.no_grad():
        std, mean = torch.std_mean(part.reward.build()(images, prompts).float())
    if not std > 0:
        raise ValueError(f"images must differ in their reward {part.reward.kind!r}; all have {float(mean):.4g}")
    return part.replace(mean=float(mean), std=float(std))
