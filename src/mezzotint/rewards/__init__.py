"""Where it fits: between pictures and numbers that say how good they are; reinforcement learning raises these numbers.

In: rewards, reward(images, prompts) -> (B,): the judge of Worlds, published preference models, a reader of words, our own trained
model, weighted sums of them; and what happens when one fails (`rewards.goal`).
Out: what is done with the numbers (`methods`), scores of whole models (`evals`).
Gotchas: whoever trains on a number must watch another one: `GoalConfig` always has both.
"""

from mezzotint.rewards.clip import AestheticConfig, CLIPRewardConfig
from mezzotint.rewards.goal import Goal, GoalConfig, RewardError
from mezzotint.rewards.image_reward import ImageRewardConfig
from mezzotint.rewards.model import LearnedConfig, RewardModel, RewardModelConfig
from mezzotint.rewards.ocr import OCRConfig
from mezzotint.rewards.reward import Reward, RewardConfig
from mezzotint.rewards.total import PartConfig, TotalConfig
from mezzotint.rewards.worlds import CreditConfig, JudgeConfig, PreferenceConfig

__all__ = [
    "AestheticConfig",
    "CLIPRewardConfig",
    "CreditConfig",
    "Goal",
    "GoalConfig",
    "ImageRewardConfig",
    "JudgeConfig",
    "LearnedConfig",
    "OCRConfig",
    "PartConfig",
    "PreferenceConfig",
    "Reward",
    "RewardConfig",
    "RewardError",
    "RewardModel",
    "RewardModelConfig",
    "TotalConfig",
]
