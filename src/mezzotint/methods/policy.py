"""What policy gradients share (GRPO, Shao et al. 2024, eq. 3): groups of samples of one prompt, their advantages, and the clipped loss.

    A = (r - mean_group) / (std_group + delta);    L = max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) + kl D

with the ratio rho of the policy's density to that of the policy that drew the sample, and the divergence D from its first weights. What
has a density is a step to a picture (`methods.flow_grpo`) or a byte of a text (`methods.enhance_grpo`).
"""

from abc import ABC
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.data.batch import Batch
from mezzotint.methods.method import MethodConfig

DELTA = 1e-4  # added to the deviation of a group's rewards
LARGEST = 5.0  # advantages are cut to this size


@dataclass
class PolicyConfig(MethodConfig, ABC, kind="policy"):
    """group: samples of a prompt. updates: optimizer steps for each roll-out. clip: how far a ratio counts. kl: weight of the divergence
    from the first weights. ValueError for a group of one.
    """

    group: int = 16
    updates: int = 2
    clip: float = 1e-4
    kl: float = 0.04

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group must be at least 2 samples of a prompt, got {self.group}")


def grouped(asked: Batch, group: int) -> tuple[list[str], list[str]]:
    """The prompts and the names of a batch, each so many times in a row."""
    rows = [row for row in range(len(asked)) for _ in range(group)]
    return [asked.prompts[row] for row in rows], [asked.ids[row] for row in rows]


def advantages(rewards: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """(B,) how much better a sample is than its group, in deviations of the group; equal names need not be neighbours.

    0 where a group's rewards are equal, and for rewards of NaN, which count in no group.
    """
    known = rewards.cpu()  # a number here and one there: on a GPU each would be waited for
    out = torch.zeros_like(known)
    members: dict[Hashable, list[int]] = {}
    for row in torch.nonzero(known.isfinite()).flatten().tolist():
        members.setdefault(groups[row], []).append(row)
    for rows in members.values():
        std, mean = torch.std_mean(known[rows], correction=0)
        out[rows] = ((known[rows] - mean) / (std + DELTA)).clamp(-LARGEST, LARGEST)
    return out.to(rewards.device)


def policy_loss(ratio: Tensor, advantage: Tensor, divergence: Tensor, config: PolicyConfig) -> Tensor:
    """The loss wherever there is a ratio. A ratio beyond 1 +- clip is not pushed further (Schulman et al. 2017, eq. 7)."""
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    return torch.maximum(-advantage * ratio, -advantage * clipped) + config.kl * divergence


def told(ratio: Tensor, advantage: Tensor, divergence: Tensor, config: PolicyConfig) -> dict[str, Tensor]:
    """What to log of a loss. telling: share of the samples that have an advantage; clipped: share of the ratios that were too far."""
    ratio, divergence = ratio.detach(), divergence.detach()
    off = (ratio - 1).abs()
    return {
        "telling": (advantage != 0).float(),
        "kl": divergence,
        "ratio": ratio,
        "ratio_off": off,
        "clipped": (off > config.clip).float(),
    }
