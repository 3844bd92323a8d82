"""What comes after the tiny recipe's pre-training: the later stages of the speedrun, each started from the one before (``--init``)."""

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.consistency import ConsistencyConfig
from mezzotint.methods.dmd import DMDConfig
from mezzotint.methods.dpo import DPOConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.recipes.tiny import GUIDANCE, SizeName, worlds
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


def student(size: SizeName, share: float, lr: float, method: MethodConfig, patience: int = 4, **sampling: object) -> RunConfig:
    """Distillation on the preferred look, as in the speedrun; the student draws as its teacher but for `sampling`.

    It is compared with its teacher on the way, and its best weights are kept. patience: evaluations without a better one after which it
    ends; 0 where its task changes on the way. The smallest size is too short to have any.
    """
    config = continued(size, share, lr)
    config.data = WorldsConfig(size=config.data.size, split="preferred", seed=3)
    config.method = method
    config.pipeline.sampling = config.pipeline.sampling.replace(**sampling)
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
    """Distillation to four steps by consistency; noise is drawn anew between them. Reached: judge 0.77, its teacher 0.93 in 30."""
    method = ConsistencyConfig(guidance=GUIDANCE, grid=16, segments=1, shift=3.0)
    return student(size, 0.2, 7e-4, method, solver="consistency", steps=4, guidance=1.0, shift=1.5)


def dmd(size: SizeName = "s") -> RunConfig:
    """Distillation to four steps by distribution matching. Reached: judge 0.82 in four calls, its teacher 0.90 in 30.

    Its teacher is guided more than it is drawn with, which the student pays in diversity. It has the most steps of all students.
    """
    method = DMDConfig(guidance=1.5 * GUIDANCE, critic_turns=2, level=0.3)
    return student(size, 0.2, 7e-4, method, solver="consistency", steps=4, guidance=1.0, shift=3.0)
