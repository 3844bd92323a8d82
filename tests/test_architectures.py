"""Every architecture in a pipeline: other networks, other paths, other shapes, through the same loop and the same sampling path."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.flow.path import scaled_linear_table, vp_linear
from mezzotint.flow.time import flux_ratio, shift
from mezzotint.models import Cond, DenoiserConfig, DiTConfig, FluxConfig, MMDiTConfig, PixArtConfig, UNetConfig
from mezzotint.pipeline import DiscretePath, LinearPath, PathConfig, Pipeline, PipelineConfig, Sampling, load
from mezzotint.text import ByteEncoderConfig
from mezzotint.train.optim import OptimConfig
from mezzotint.train.trainer import RunConfig, TrainConfig, Trainer

TEXT = ByteEncoderConfig(width=32, depth=1, heads=2)
UNET = UNetConfig(widths=(8, 16), depths=(0, 1), heads=(1, 2), groups=4, channels=3, text_width=32, pooled_width=32, layers=1)
MMDIT = MMDiTConfig(width=32, depth=2, heads=2, patch=4, channels=3, text_width=32, pooled_width=32, table=8, base=8)
PIXART = PixArtConfig(width=48, depth=2, heads=2, patch=4, channels=3, text_width=32)
FLUX = FluxConfig(width=32, joint=1, single=1, heads=2, axes=(4, 6, 6), patch=4, channels=3, text_width=32, pooled_width=32)
SAMPLING = Sampling(size=(16, 24), steps=3)
VARIANTS: dict[str, tuple[DenoiserConfig, PathConfig]] = {
    "unet": (UNET, DiscretePath()),
    "mmdit": (MMDIT, LinearPath()),
    "pixart": (PIXART, DiscretePath(schedule="linear", beta_min=1e-4, beta_max=0.02)),
    "flux": (FLUX, LinearPath()),
    "unet of the VP velocity": (UNET.replace(prediction="vp_velocity"), DiscretePath(zero_terminal=True)),
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> PipelineConfig:
    denoiser, path = VARIANTS[request.param]
    return PipelineConfig(TEXT, denoiser, sampling=SAMPLING, path=path)


def filled(config: PipelineConfig) -> Pipeline:
    """A pipeline whose output layers are not zero."""
    torch.manual_seed(0)
    pipeline = config.build()
    for parameter in pipeline.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return pipeline.eval()


def test_it_trains_samples_and_comes_back(config: PipelineConfig, tmp_path: Path) -> None:
    run = RunConfig(
        pipeline=config.__class__(TEXT, config.denoiser, sampling=Sampling(size=32, steps=2), path=config.path),
        data=WorldsConfig(),
        optim=OptimConfig(lr=1e-3, warmup=2),
        train=TrainConfig(steps=4, batch=4, log=1, preview=4, evaluate=4, checkpoint=4, held_out=2, preview_prompts=("a red star",)),
    )
    pipeline = Trainer(run, tmp_path).run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    assert list((tmp_path / "previews").glob("*.png"))
    picture = pipeline("a red star", size=(16, 24))
    assert picture.shape == (1, 3, 16, 24)
    assert torch.equal(load(tmp_path)("a red star", size=(16, 24)), picture)


def test_its_data_goes_through_json(config: PipelineConfig) -> None:
    assert PipelineConfig.from_data(json.loads(json.dumps(config.to_data()))) == config


def test_pictures_do_not_depend_on_their_neighbours(config: PipelineConfig) -> None:
    pipeline = filled(config)
    together = pipeline(["a red star", "two green circles above a blue square"], seed=3)
    assert together.shape == (2, 3, 16, 24)
    assert torch.allclose(pipeline("two green circles above a blue square", seed=4), together[1:], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


class Exact(torch.nn.Module):
    """The best prediction of the noise where data are normal numbers of spread s: b x / (s^2 a^2 + b^2), x = a x0 + b eps."""

    def __init__(self, table: Tensor, spread: float) -> None:
        super().__init__()
        self.table, self.spread, self.weight = table, spread, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        abar = self.table[(1000 * t).round().long()].float()[:, None, None, None]
        return (1 - abar).sqrt() * x / (self.spread**2 * abar + 1 - abar)


def test_an_exact_network_of_the_discrete_path_draws_its_data() -> None:
    pipeline = filled(PipelineConfig(TEXT, UNET, path=DiscretePath()))
    pipeline.denoiser = Exact(scaled_linear_table(), 0.3)  # type: ignore[assignment]
    # Trailing steps of 1,000 are all indices, so that nothing lies between entries of the table; the codec clamps at 1, that is 3 spreads.
    images = pipeline("", 2, steps=1000, guidance=1.0)
    assert float(images.std()) == pytest.approx(0.3, rel=0.02)


def test_the_discrete_path_is_entered_where_its_table_ends_and_left_at_data() -> None:
    path = DiscretePath()
    times = path.times(20, 1.0)
    assert len(times) == 21
    assert bool((times.diff() < 0).all())
    table = scaled_linear_table()
    indices = torch.arange(999, 0, -50)  # trailing: 999, 949, ..., 49
    a, b = table[indices].sqrt(), (1 - table[indices]).sqrt()
    assert torch.allclose(times[:-1], (b / (a + b)).float(), atol=1e-6)
    assert times[-1] == 0
    pipeline = filled(PipelineConfig(TEXT, UNET, path=path))
    start = pipeline.entered(torch.ones(1), times)
    assert start.item() == pytest.approx(1 / float(a[0] + b[0]), rel=1e-5)  # unit noise as the last point of the VP path
    assert torch.equal(pipeline.entered(torch.ones(1), torch.tensor([1.0, 0.0])), torch.ones(1))


def test_tables_are_those_of_their_schedules() -> None:
    linear = DiscretePath(schedule="linear", beta_min=1e-4, beta_max=0.02).table()
    assert torch.allclose(linear.sqrt(), vp_linear(torch.arange(1, 1001) / 1000).alpha.double(), atol=2e-3)
    assert DiscretePath(schedule="cosine").table()[0] > 0.999
    assert DiscretePath(zero_terminal=True).table()[-1] == 0


def test_the_shift_of_flux_grows_with_the_picture() -> None:
    pipeline = filled(PipelineConfig(TEXT, FLUX, sampling=Sampling(size=(32, 64), steps=4, shift="flux")))
    assert pipeline.grid((32, 64)) == (8, 16)
    expected = shift(torch.linspace(1, 0, 5, dtype=torch.float64), flux_ratio(8 * 16)).float()
    assert torch.equal(pipeline.times(pipeline.config.sampling), expected)
    small = pipeline.times(pipeline.config.sampling.replace(size=16))
    assert bool((small[1:-1] < expected[1:-1]).all())


def test_a_distilled_network_is_told_the_guidance_and_called_once() -> None:
    pipeline = filled(PipelineConfig(TEXT, FLUX, sampling=SAMPLING))
    told: list[list[float]] = []
    real = pipeline.denoiser.forward

    def watched(x: Tensor, t: Tensor, cond: Cond) -> Any:
        assert cond.guidance is not None
        told.append(cond.guidance.tolist())
        return real(x, t, cond)

    pipeline.denoiser.forward = watched
    first = pipeline("a red star", guidance=3.5)
    assert told == [[3.5]] * 3
    assert not torch.allclose(first, pipeline("a red star", guidance=1.5), atol=1e-4)
    pipeline.velocity(torch.randn(2, 3, 8, 8), torch.rand(2), pipeline.encode(["a", "b"]))
    assert told[-1] == [1.0, 1.0], "training is without guidance"


def test_a_network_is_told_the_size_in_pixels() -> None:
    pipeline = filled(PipelineConfig(TEXT, PIXART, sampling=SAMPLING))
    x, t, cond = torch.randn(1, 3, 16, 24), torch.rand(1), pipeline.encode(["a"])
    seen = pipeline.velocity(x, t, cond)
    cond.size = torch.tensor([[16.0, 24.0]])
    assert torch.equal(pipeline.velocity(x, t, cond), seen)
    cond.size = torch.tensor([[24.0, 16.0]])
    assert not torch.allclose(pipeline.velocity(x, t, cond), seen, atol=1e-4)


def test_a_network_runs_in_the_precision_of_its_weights() -> None:
    pipeline = filled(PipelineConfig(TEXT, MMDIT, sampling=SAMPLING))
    exact = pipeline("a red star")
    pipeline.denoiser.to(torch.bfloat16)
    low = pipeline("a red star")
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).abs().max()) < 0.2


@pytest.mark.parametrize(
    ("denoiser", "size", "message"),
    [
        (MMDIT, 64, "at most 8 patches of 4"),
        (MMDIT, (16, 18), "a multiple of 4 pixels, got 18"),
        (DiTConfig(width=32, heads=2, patch=8, text_width=32), 20, "a multiple of 8 pixels, got 20"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(denoiser: DenoiserConfig, size: Any, message: str) -> None:
    pipeline = PipelineConfig(TEXT, denoiser).build()
    with pytest.raises(UserError, match=f"cannot draw that size: .*{message}"):
        pipeline("a", size=size)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"denoiser\.channels must be the codec's 3, got 16"):
        PipelineConfig(TEXT, MMDIT.replace(channels=16)).build()
    with pytest.raises(UserError, match="needs square pictures, and the size is 24x16"):
        _ = SAMPLING.side
