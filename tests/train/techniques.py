"""Every technique, tiny: what tests and benchmarks of many ranks train."""

from dataclasses import replace

from bright import BRIGHT
from lettered import LetteredConfig
from prepared import PreparedConfig

from mezzotint.methods.add import ADDConfig
from mezzotint.methods.consistency import ConsistencyConfig
from mezzotint.methods.consistency_training import ConsistencyTrainingConfig
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.dreambooth import DreamBoothConfig
from mezzotint.methods.enhance import EnhanceConfig
from mezzotint.methods.flow_grpo import FlowGRPOConfig
from mezzotint.methods.guidance_distill import GuidanceDistillConfig
from mezzotint.methods.ladd import LADDConfig
from mezzotint.methods.lcm import LCMConfig
from mezzotint.methods.meanflow import MeanFlowConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.methods.progressive import ProgressiveConfig
from mezzotint.methods.refl import ReFLConfig
from mezzotint.methods.reflow import ReflowConfig
from mezzotint.methods.repa import OwnConfig, REPAConfig
from mezzotint.methods.reward import BradleyTerryConfig
from mezzotint.methods.scm import SCMConfig
from mezzotint.rewards import RewardModelConfig
from mezzotint.rewards.model import SmallEncoderConfig
from mezzotint.text import ByteEncoderConfig
from mezzotint.text.writer import ByteWriterConfig
from mezzotint.train.trainer import RunConfig

VISION = OwnConfig("own", layer=1)
WRITER = ByteWriterConfig(width=32, depth=1, heads=2, length=272)
METHODS: dict[str, MethodConfig] = {
    "dpo": DPOConfig(),
    "consistency": ConsistencyConfig(),
    "dmd": DMDConfig(critic_turns=1),
    "flow_grpo": FlowGRPOConfig(goal=BRIGHT, group=2, steps=3, kl=100.0),
    "refl": ReFLConfig(BRIGHT, steps=3, last=2),
    "progressive": ProgressiveConfig(first=2, last=1, stage=1),
    "guidance_distill": GuidanceDistillConfig(),
    "repa": REPAConfig(vision=VISION, layer=1, hidden=32),
    "dreambooth": DreamBoothConfig(class_prompt="a ring", pictures=4),
    "reflow": ReflowConfig(perceptual=0.1),
    "meanflow": MeanFlowConfig(difference=0.02),
    "ladd": LADDConfig(),
    "add": ADDConfig(VISION, levels=1),
    "scm": SCMConfig(warmup=10, difference=0.02),
    "lcm": LCMConfig(grid=50, skip=2),
    "consistency_training": ConsistencyTrainingConfig(stage=3),
    "reward": BradleyTerryConfig(RewardModelConfig(SmallEncoderConfig((8, 16), ByteEncoderConfig(width=16, heads=2)))),
    "enhance": EnhanceConfig(WRITER),
    "enhance_grpo": LetteredConfig(writer=WRITER.replace(length=112), group=2),
}
PAIRED = ("dpo", "reward")
# Of those that train not the student, or not alone.
LOSSES = {"repa": "student+projector.loss", "reward": "reward.loss", "enhance": "writer.loss", "enhance_grpo": "writer.loss"}


def quiet(config: RunConfig, optimizer: str = "adamw") -> RunConfig:
    """One block, four micro-batches of two, nothing drawn before the end, and no best weights."""
    last = config.train.steps
    train = config.train.replace(batch=2, accumulate=4, evaluate=last, preview=last, preview_prompts=(), checkpoint=last)
    pipeline = config.pipeline.replace(denoiser=config.pipeline.denoiser.replace(depth=1))
    optim, evaluation = config.optim.replace(name=optimizer), config.evaluation.replace(best="")
    return replace(config, pipeline=pipeline, train=train, optim=optim, evaluation=evaluation)


def of_method(config: RunConfig) -> RunConfig:
    """Two micro-batches for a student that has an opinion, of captions that are all short."""
    config = quiet(config)
    config.train.accumulate = 2
    data = config.data.replace(long_every=1_000_000)
    return replace(config, pipeline=PreparedConfig(**vars(config.pipeline)), data=data)
