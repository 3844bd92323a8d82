"""What comes after the tiny recipe's pre-training: the later stages of the speedrun, each started from the one before (``--init``)."""

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.consistency import ConsistencyConfig
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.recipes.tiny import SizeName, worlds
from mezzotint.train.evaluation import EvaluationConfig
from mezzotint.train.optim import OptimConfig
from mezzotint.train.trainer import RunConfig


def continued(size: SizeName, share: float, lr: float) -> RunConfig:
    """A later stage: so much of the pre-training's steps, by AdamW at a rate that keeps what was learned."""
    config = worlds(size)
    steps = max(4, round(config.train.steps * share))
    config.optim = OptimConfig(lr=lr, warmup=steps // 10, average=0.99)
    config.evaluation = EvaluationConfig(best="")  # what the flow's loss says is beside the point of nearly all of them
    config.train = config.train.replace(steps=steps, log=max(1, steps // 60), evaluate=max(1, steps // 4), preview=max(1, steps // 2))
    return config


def watched(config: RunConfig, size: SizeName, patience: int = 4) -> RunConfig:
    """A student that is compared with what it starts from: its best weights are kept, and it ends when it no longer gets better.

    patience: see `EvaluationConfig`; 0 for students whose task changes on the way. The smallest size is too short to have any.
    """
    every, pictures, patience = (2, 1, 0) if size == "xs" else (10, 20, patience)
    config.evaluation = EvaluationConfig("students", max(1, config.train.steps // every), pictures, best="score", patience=patience)
    return config


def sft(size: SizeName = "s") -> RunConfig:
    """Fine-tuning on the preferred sliver: style, light and composition of one taste."""
    config = continued(size, share=0.1, lr=3e-4)
    config.evaluation = EvaluationConfig()
    config.data = WorldsConfig(size=config.data.size, split="preferred", seed=1)
    return config


def dpo(size: SizeName = "s") -> RunConfig:
    """Preference optimisation on pairs whose winner has the preferred look."""
    config = continued(size, share=0.04, lr=5e-5)
    config.data = WorldsConfig(size=config.data.size, pairs=True, seed=2)
    config.method = DPOConfig(beta=2000.0, anchor=1.0)
    return config


def consistency(size: SizeName = "s") -> RunConfig:
    """Distillation to four steps by consistency; noise is drawn anew between them. Reached: judge 0.65, its teacher 0.89 in 30."""
    config = continued(size, share=0.1, lr=2e-3)
    config.data = WorldsConfig(size=config.data.size, split="preferred", seed=3)
    teacher = config.pipeline.sampling
    config.method = ConsistencyConfig(guidance=teacher.guidance, grid=16, segments=1, shift=3.0)
    config.pipeline.sampling = teacher.replace(steps=4, guidance=1.0, solver="consistency", shift=1.5)
    return watched(config, size)


def dmd(size: SizeName = "s") -> RunConfig:
    """Distillation to four steps by distribution matching. Reached: judge 0.79 in four calls, its teacher 0.89 in 30.

    It has the most steps of all students, and needs them: after a third of these it is no better than `consistency` (docs/LOG.md).
    """
    config = continued(size, share=0.2, lr=1e-3)
    config.data = WorldsConfig(size=config.data.size, split="preferred", seed=3)
    teacher = config.pipeline.sampling
    config.method = DMDConfig(guidance=teacher.guidance, critic_turns=2, level=0.3)
    config.pipeline.sampling = teacher.replace(steps=4, guidance=1.0, solver="consistency", shift=3.0)
    return watched(config, size)
