"""The recipes on other models, and on other data, than those that they are written for."""

from dataclasses import replace

from mezzotint.data.kinds import DataConfig
from mezzotint.data.pairs import PairsConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.pipeline import PipelineConfig
from mezzotint.recipes.tiny import SizeName, worlds
from mezzotint.train.evaluation import EvaluationConfig
from mezzotint.train.trainer import RunConfig

GUIDANCES = ("guidance", "largest", "scales")  # fields of methods that say how strongly a teacher is guided


def started(config: RunConfig, start: PipelineConfig, size: SizeName) -> RunConfig:
    """A later stage of another model than the tiny one: its parts, and its way of drawing but for what the recipe changes of it."""
    plain, own = vars(worlds(size).pipeline.sampling), vars(config.pipeline.sampling)
    sampling = start.sampling.replace(**{name: value for name, value in own.items() if value != plain[name]})
    config.pipeline = start.replace(sampling=sampling)
    if isinstance(config.data, WorldsConfig):
        config.data = config.data.replace(size=sampling.side)
    elif isinstance(config.data, PairsConfig):
        config.data = config.data.replace(captions=config.data.captions.replace(size=sampling.side))
    config.method = _guided_like(config.method, start.sampling.guidance / worlds(size).pipeline.sampling.guidance)
    return config


def _guided_like(method: MethodConfig, ratio: float) -> MethodConfig:
    """A method whose teacher is guided by so many times the scale that the recipe has, which is the tiny model's."""

    def scaled(scale: object) -> object:
        if isinstance(scale, tuple):
            return tuple(map(scaled, scale))
        return max(1.0, scale * ratio) if isinstance(scale, float) and scale > 1 else scale

    return method.replace(**{name: scaled(value) for name, value in vars(method).items() if name in GUIDANCES})


def on_own(config: RunConfig, data: DataConfig) -> RunConfig:
    """A recipe on pictures of one's own: Worlds' judge and its subject say nothing there, so no weights are best and no run ends early."""
    config.data = data
    if config.evaluation.suite == "subject":
        config.evaluation = EvaluationConfig(best="")
    elif config.evaluation.suite == "students":
        config.evaluation = replace(config.evaluation, best="", patience=0)
    return config
