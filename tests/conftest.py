"""What all tests share."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.models import DiTConfig
from mezzotint.pipeline import Pipeline, PipelineConfig, Sampling
from mezzotint.text import ByteEncoderConfig
from mezzotint.train.optim import OptimConfig
from mezzotint.train.trainer import RunConfig, TrainConfig

# Threads wait for each other longer than tests this small compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables of folders go to a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny_pipeline() -> PipelineConfig:
    """A pipeline that runs in milliseconds."""
    return PipelineConfig(
        text=ByteEncoderConfig(width=32, depth=1, heads=2),
        denoiser=DiTConfig(width=32, depth=2, heads=2, patch=8, text_width=32),
        sampling=Sampling(size=32, steps=3),
    )


@pytest.fixture
def tiny() -> PipelineConfig:
    """See `tiny_pipeline`."""
    return tiny_pipeline()


@pytest.fixture
def pipeline(tiny: PipelineConfig) -> Pipeline:
    """A tiny pipeline whose output layers are not zero, as if it had been trained."""
    torch.manual_seed(0)
    built = tiny.build()
    for parameter in built.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return built.eval()


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


@pytest.fixture
def run_config() -> Callable[..., RunConfig]:
    """See `tiny_run`."""
    return tiny_run


@pytest.fixture(scope="module")
def run_config_once() -> Callable[..., RunConfig]:
    """`tiny_run`, for what a whole file of tests shares."""
    return tiny_run
