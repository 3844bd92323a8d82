"""A subject from a few pictures: minutes on two cores, started from a pipeline (``--init``)."""

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.dreambooth import DreamBoothConfig
from mezzotint.recipes.post import continued
from mezzotint.recipes.tiny import SizeName
from mezzotint.train.evaluation import EvaluationConfig
from mezzotint.train.trainer import RunConfig
from mezzotint.worlds import subject


def dreambooth(size: SizeName = "s") -> RunConfig:
    """DreamBooth on the subject of Worlds. Reached: fidelity 1.00 and 2% of the class drifting, all of it with ``--method.prior 0``."""
    config = continued(size, share=0.08, lr=2e-4)
    config.data = WorldsConfig(size=config.data.size, split="subject")
    config.method = DreamBoothConfig(class_prompt=subject.CLASS)
    config.train = config.train.replace(batch=16, preview_prompts=(subject.CAPTION, subject.CLASS, subject.SHOWS))
    config.evaluation = EvaluationConfig("subject", max(1, config.train.steps // 4), pictures=6 if size == "xs" else 24, best="")
    return config


def textual_inversion(size: SizeName = "s") -> RunConfig:
    """Only the embedding of the rare word learns. Reached: fidelity 0.00, as the frozen network draws no purple ring by its name either;
    0.98 on six pictures of a blue one (docs/LOG.md).
    """
    config = dreambooth(size)
    config.method = DreamBoothConfig(prior=0.0, word=subject.WORD)
    config.optim = config.optim.replace(lr=2e-2)
    return config
