"""Reward models, and students that are trained with a reward: minutes on two cores, each started from a pipeline (``--init``)."""

from dataclasses import replace

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.flow_grpo import FlowGRPOConfig
from mezzotint.methods.refl import ReFLConfig
from mezzotint.methods.reward import BradleyTerryConfig
from mezzotint.recipes.post import continued
from mezzotint.recipes.tiny import SizeName
from mezzotint.rewards import GoalConfig, JudgeConfig, LearnedConfig, PreferenceConfig
from mezzotint.train.trainer import RunConfig

MODEL = "runs/tiny.reward"  # where the recipe tiny.reward leaves its model
LOOK = GoalConfig(LearnedConfig(MODEL), JudgeConfig())  # the learned taste is raised, and what pictures show is watched
RIGHT = GoalConfig(JudgeConfig(), PreferenceConfig())  # the other way round


def reward(size: SizeName = "s") -> RunConfig:
    """A model of the preferred look, from pairs. After 60 of the steps: all of 586 held-out pairs right."""
    config = continued(size, share=0.06, lr=2e-3)
    config.data = WorldsConfig(size=config.data.size, pairs=True, seed=5)
    config.method = BradleyTerryConfig()
    config.train = config.train.replace(preview_prompts=(), evaluate=config.train.steps)
    return config


def grpo(size: SizeName = "s") -> RunConfig:
    """Flow-GRPO on what the judge says. At four times this rate it destroys a weak start within its 60 steps, and at this one the rewards
    of `grpo_fast` stay where they are for 80: 128 pictures a step are too few for what the gradient has of noise (docs/LOG.md).
    """
    config = continued(size, share=0.012, lr=5e-5)
    config.data = WorldsConfig(size=config.data.size, seed=6, long_every=1_000_000)
    config.method = FlowGRPOConfig(RIGHT, group=16, steps=8, updates=2, clip=1e-3, kl=0.01)
    config.train = config.train.replace(batch=8, log=1)
    config.optim = replace(config.optim, decay="constant", warmup=2, average=0.9)
    return config


def dance_grpo(size: SizeName = "s") -> RunConfig:
    """DanceGRPO: the same noise level at all times, one first noise for a group, no reference. Not yet run."""
    config = grpo(size)
    assert isinstance(config.method, FlowGRPOConfig)
    config.method = config.method.replace(law="constant", level=0.3, shared=True, kl=0.0)
    return config


def grpo_fast(size: SizeName = "s") -> RunConfig:
    """Flow-GRPO-Fast: two stochastic steps at random in the first half, branching from one noise; three times the updates. Not yet run."""
    config = grpo(size)
    assert isinstance(config.method, FlowGRPOConfig)
    config.method = config.method.replace(window=2, shared=True, kl=0.0)
    config.train = config.train.replace(steps=3 * config.train.steps)
    return config


def mix_grpo(size: SizeName = "s") -> RunConfig:
    """MixGRPO: a window of stochastic steps that moves from noise to data. Not yet run."""
    config = grpo_fast(size)
    assert isinstance(config.method, FlowGRPOConfig)
    config.method = config.method.replace(slide=max(1, config.train.steps // 7), shared=False, kl=0.01)
    return config


def grpo_learned(size: SizeName = "s") -> RunConfig:
    """Flow-GRPO on the learned taste, with the judge watching; ``--method.kl 0`` shows how a reward is deceived. Not yet run."""
    config = grpo(size)
    assert isinstance(config.method, FlowGRPOConfig)
    config.method = config.method.replace(goal=LOOK)
    return config


def refl(size: SizeName = "s") -> RunConfig:
    """ReFL on the learned taste. As it stands it deceives the reward model within 30 steps: judge 0.02 for 0.89 after 200."""
    config = continued(size, share=0.04, lr=1e-4)
    config.data = WorldsConfig(size=config.data.size, seed=7)
    config.method = ReFLConfig(LOOK, weight=0.05)
    config.train = config.train.replace(log=1)
    return config


def dpo_online(size: SizeName = "s") -> RunConfig:
    """Online DPO: pairs from the student's own pictures by the judge. Not yet run."""
    config = continued(size, share=0.02, lr=1e-4)
    config.data = WorldsConfig(size=config.data.size, seed=8)
    config.method = DPOConfig(beta=2000.0, anchor=1.0, draws=4, steps=10, goal=RIGHT)
    config.train = config.train.replace(log=1)
    return config
