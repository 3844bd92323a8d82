"""What all tests share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_runs import tiny_pipeline, tiny_run

from mezzotint.pipeline import Pipeline, PipelineConfig
from mezzotint.train.trainer import RunConfig

# Threads wait for each other longer than tests this small compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables of folders go to a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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


@pytest.fixture
def run_config() -> Callable[..., RunConfig]:
    """See `tiny_run`."""
    return tiny_run


@pytest.fixture(scope="module")
def run_config_once() -> Callable[..., RunConfig]:
    """`tiny_run`, for what a whole file of tests shares."""
    return tiny_run
