"""Pipelines and runs that take milliseconds."""

from dataclasses import replace

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.models import DiTConfig
from mezzotint.pipeline import PipelineConfig, Sampling
from mezzotint.text import ByteEncoderConfig
from mezzotint.train.optim import OptimConfig
from mezzotint.train.trainer import RunConfig, TrainConfig


def tiny_pipeline() -> PipelineConfig:
    """A pipeline that runs in milliseconds."""
    return PipelineConfig(
        text=ByteEncoderConfig(width=32, depth=1, heads=2),
        denoiser=DiTConfig(width=32, depth=2, heads=2, patch=8, text_width=32),
        sampling=Sampling(size=32, steps=3),
    )


def tiny_run(method: MethodConfig | None = None, pairs: bool = False, **train: object) -> RunConfig:
    """A run of a few steps; keywords change its training."""
    settings = TrainConfig(steps=6, batch=4, log=1, preview=3, evaluate=3, checkpoint=2, held_out=4, preview_prompts=("a red star",))
    config = RunConfig(
        pipeline=tiny_pipeline(),
        data=WorldsConfig(pairs=pairs),
        optim=OptimConfig(lr=1e-3, warmup=2, average=0.9),
        train=replace(settings, **train),  # type: ignore[arg-type]
    )
    return replace(config, method=method) if method else config
