"""The own parts of the lifecycle: a reward of two, and a subject on a student of few steps. Each starts from a pipeline (``--init``)."""

from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.flow_grpo import FlowGRPOConfig
from mezzotint.models.lora import LoRAConfig
from mezzotint.recipes.personal import dreambooth
from mezzotint.recipes.post import dmd
from mezzotint.recipes.reinforce import grpo
from mezzotint.recipes.reward import MODEL, dpo_online
from mezzotint.recipes.tiny import SizeName
from mezzotint.rewards import CreditConfig, GoalConfig, LearnedConfig, PartConfig, PreferenceConfig, TotalConfig
from mezzotint.train.trainer import RunConfig

MARGIN = 10.0  # of winners over losers, about, as `recipes.reward.reward` leaves its model


def both(model: str = MODEL) -> GoalConfig:
    """To be right and to be liked: a picture that lost the whole look has lost as much as one that is wrong. The exact look is watched."""
    return GoalConfig(TotalConfig((PartConfig(CreditConfig()), PartConfig(LearnedConfig(model), std=MARGIN))), PreferenceConfig())


def grpo_both(size: SizeName = "s", goal: GoalConfig | None = None) -> RunConfig:
    """Flow-GRPO on what the judge says and the learned taste together. From a good start it only loses (docs/LOG.md): take `dpo_both`."""
    config = grpo(size)
    assert isinstance(config.method, FlowGRPOConfig)
    config.method = config.method.replace(goal=goal or both())
    return config


def dpo_both(size: SizeName = "s", goal: GoalConfig | None = None) -> RunConfig:
    """Online DPO on the same. Reached: judge 0.91 and taste 0.94 as before, 0.092 of diversity instead of 0.083."""
    config = dpo_online(size)
    assert isinstance(config.method, DPOConfig)
    config.method = config.method.replace(goal=goal or both())
    return config


def subject_lora(size: SizeName = "s") -> RunConfig:
    """DreamBooth in an adapter on the student of `recipes.post.dmd`, which goes on drawing in four steps.

    Reached: fidelity 0.625, none of the class drifting, other prompts 0.575 for 0.742.
    """
    config = dreambooth(size)
    config.adapter = LoRAConfig(rank=8)
    config.optim = config.optim.replace(lr=1e-3)
    config.pipeline.sampling = dmd(size).pipeline.sampling
    return config
