"""What a student is rewarded for, what is watched beside it, and what happens when a reward fails.

A reward is somebody else's network or program. When it raises, answers in another shape or with a number that is none, the pictures
and prompts at fault are found, saved, and the run stops; or it goes on without them and counts.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mezzotint import config, pictures
from mezzotint.errors import UserError
from mezzotint.rewards.reward import Reward, RewardConfig
from mezzotint.rewards.worlds import JudgeConfig, PreferenceConfig


class RewardError(UserError):
    """A reward failed; the message says which, how, on what prompt, and where the picture is."""


@dataclass
class GoalConfig(config.Config, kind="goal"):
    """reward: what training raises. held_out: what it never sees, so that a student who deceives the reward is caught.

    on_failure: "stop" with the first reward that fails, or "skip" its pictures and count them. failures: folder for these pictures and
    `failures.jsonl`, which names their prompts and the reasons.
    """

    reward: RewardConfig = field(default_factory=JudgeConfig)
    held_out: RewardConfig = field(default_factory=PreferenceConfig)
    on_failure: Literal["stop", "skip"] = "stop"
    failures: str = "runs/reward-failures"

    def build(self) -> "Goal":
        return Goal(self)


class Goal:
    """Two rewards, each made safe by `GoalConfig.on_failure`. A picture whose reward failed has a score of NaN."""

    def __init__(self, config: GoalConfig) -> None:
        self.config = config
        self.reward, self.held_out = config.reward.build(), config.held_out.build()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 rewards, differentiable where the reward is. RewardError where one fails and the policy is to stop."""
        return self._safe(self.reward, self.config.reward.kind, images, prompts)

    @torch.no_grad()
    def watch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 held-out rewards."""
        return self._safe(self.held_out, self.config.held_out.kind, images, prompts)

    def _safe(self, reward: Reward, name: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = _tried(reward, images, prompts)
        if isinstance(scores, Tensor):
            return scores
        alone = [_tried(reward, images[row : row + 1], prompts[row : row + 1]) for row in range(len(prompts))]
        for row, answer in enumerate(alone):
            if isinstance(answer, str):
                self._save(name, answer, images[row], prompts[row])
        nothing = images.new_full((1,), math.nan)
        return torch.cat([answer if isinstance(answer, Tensor) else nothing for answer in alone])

    def _save(self, name: str, reason: str, image: Tensor, prompt: str) -> None:
        """Keep a picture that a reward failed on; stop, where that is the policy."""
        folder = Path(self.config.failures)
        pixels = image.detach().float().cpu().nan_to_num()
        path = folder / f"{name}-{zlib.crc32(pixels.numpy().tobytes() + prompt.encode()):08x}.png"
        pictures.save(pixels, path, prompt)
        with (folder / "failures.jsonl").open("a") as file:
            file.write(json.dumps({"picture": path.name, "prompt": prompt, "reward": name, "reason": reason}) + "\n")
        if self.config.on_failure == "stop":
            advice = "mend the reward, or go on without such pictures by on_failure skip"
            raise RewardError(f"reward {name!r} {reason} on {prompt!r}; the picture is {path}; {advice}")


def _tried(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor | str:
    """Scores (B,), or what is wrong with them."""
    try:
        scores = reward(images, prompts)
    except Exception as error:  # whatever another's program raises: it is reported with the picture that caused it
        return f"raised {type(error).__name__} ({' '.join(str(error).split())})"
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        return f"gave {found} instead of a tensor ({len(prompts)},)"
    if not scores.isfinite().all():
        return "gave a score that is not finite"
    return scores.to(images.device, torch.float32)
