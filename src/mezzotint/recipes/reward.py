"""Reward models, and students that are trained with a reward: minutes on two cores, each started from a pipeline (``--init``)."""

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.refl import ReFLConfig
from mezzotint.methods.reward import BradleyTerryConfig
from mezzotint.recipes.post import continued
from mezzotint.recipes.tiny import SizeName
from mezzotint.rewards import CreditConfig, GoalConfig, JudgeConfig, LearnedConfig
from mezzotint.train.trainer import RunConfig

MODEL = "runs/tiny.reward"  # where the recipe tiny.reward leaves its model
LOOK = GoalConfig(LearnedConfig(MODEL), JudgeConfig())  # the learned taste is raised, and what pictures show is watched
RIGHT = GoalConfig(CreditConfig(), JudgeConfig())  # the other way round


def reward(size: SizeName = "s") -> RunConfig:
    """A model of the preferred look, from pairs. After 60 of the steps: all of 586 held-out pairs right."""
    config = continued(size, share=0.06, lr=2e-3)
    config.data = WorldsConfig(size=config.data.size, pairs=True, seed=5)
    config.method = BradleyTerryConfig()
    config.train = config.train.replace(preview_prompts=(), evaluate=config.train.steps)
    return config


def refl(size: SizeName = "s") -> RunConfig:
    """ReFL on the learned taste. As it stands it deceives the reward model within 30 steps: judge 0.02 for 0.89 after 200."""
    config = continued(size, share=0.04, lr=1e-4)
    config.data = WorldsConfig(size=config.data.size, seed=7)
    config.method = ReFLConfig(LOOK, weight=0.05)
    config.train = config.train.replace(log=1)
    return config


def dpo_online(size: SizeName = "s") -> RunConfig:
    """Online DPO: pairs from the student's own pictures by the judge. Reached, from what `mistaken` leaves: 0.41 for 0.36."""
    config = continued(size, share=0.02, lr=1e-4)
    config.data = WorldsConfig(size=config.data.size, seed=8)
    config.method = DPOConfig(beta=2000.0, anchor=1.0, draws=4, steps=10, goal=RIGHT)
    config.train = config.train.replace(log=1)
    return config
