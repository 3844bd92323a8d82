"""Power spectra of waves and of white noise, and the order in which noise drowns them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, normal

from mezzotint.flow.path import interpolate
from mezzotint.flow.spectrum import drowning_time, radial_power
from mezzotint.flow.time import sd3_ratio, shift


def test_white_noise_is_equally_strong_everywhere() -> None:
    power = radial_power(normal((400, 3, 32, 32), torch.float64)).mean((0, 1))
    assert power.shape == (17,)
    # The mean over 1,200 pictures of four numbers or more with a standard deviation of about 1 each.
    assert torch.allclose(power, torch.ones_like(power), atol=0.12)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48), (33, 40)])
def test_a_wave_has_its_power_at_its_frequency(height: int, width: int) -> None:
    short = min(height, width)
    for k in (0, 3, short // 2):
        phase = 2 * math.pi * k * torch.arange(short, dtype=torch.float64) / short
        wave = phase.cos()[:, None].expand(height, width) if height == short else phase.cos().expand(height, width)
        power = radial_power(wave)
        assert power.argmax() == k
        assert float(power.sum() - power[k]) < 1e-12


def test_power_is_conserved() -> None:
    # Parseval: a picture without power beyond the rings keeps its mean square, each ring weighted by its size.
    x = normal((16, 16), torch.float64)
    frequency = torch.hypot(torch.fft.fftfreq(16)[:, None], torch.fft.fftfreq(16)) * 16
    smooth = torch.fft.ifft2(torch.fft.fft2(x) * (frequency < 8.5)).real
    sizes = frequency.round().long()[frequency < 8.5].bincount()
    assert float((radial_power(smooth) * sizes).sum() / 256) == pytest.approx(float(smooth.square().mean()), rel=1e-9)


def test_noise_drowns_the_finest_first() -> None:
    # Pictures whose power falls as the inverse square of frequency.
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.fftfreq(32)).double() * 32
    shape = 4 / frequency.clamp_min(0.5)
    eps = normal((300, 32, 32), torch.float64, seed=1)
    x0 = torch.fft.ifft2(torch.fft.fft2(normal((300, 32, 32), torch.float64)) * shape).real
    power = radial_power(x0).mean(0)
    times = drowning_time(power)
    assert (times[1:].diff() < 0).all()
    for k in (2, 8, 15):
        at = radial_power(interpolate(x0, eps, times[k].expand(300))).mean(0)
        data = (1 - times[k]) ** 2 * power
        assert float(at[k] / data[k]) == pytest.approx(2, rel=0.1)  # half of it is noise
        assert at[1] < 2 * data[1]  # coarser: data still
        assert at[-1] > 2 * data[-1]  # finer: noise already


def test_drowning_times_are_the_closed_form() -> None:
    power = torch.tensor([0.0, 1e-4, 1.0, 1e4], dtype=torch.float64)
    t = drowning_time(power)
    assert torch.allclose((1 - t) ** 2 * power, t**2)
    assert t[0] == 0
    assert t[2] == 0.5


def test_more_pixels_of_one_scene_drown_later_by_the_ratio_of_the_shift() -> None:
    frequency, phase = torch.arange(1, 7, dtype=torch.float64), torch.arange(6, dtype=torch.float64)

    def scene(side: int) -> torch.Tensor:
        waves = torch.cos(2 * math.pi * frequency[:, None] * torch.arange(side) / side + phase[:, None]) / frequency[:, None]
        return waves.sum(0)[:, None] + waves.sum(0)

    small, large = (drowning_time(radial_power(scene(side))[1:7]) for side in (16, 64))
    assert torch.allclose(large, shift(small, sd3_ratio(64**2, 16**2)))


@settings(deadline=None)
@given(lead=st.lists(st.integers(1, 3), max_size=3), height=st.integers(1, 20), width=st.integers(1, 20), dtype=DTYPES)
def test_any_shape_has_a_finite_spectrum(lead: list[int], height: int, width: int, dtype: torch.dtype) -> None:
    power = radial_power(normal((*lead, height, width), dtype))
    assert power.shape == (*lead, min(height, width) // 2 + 1)
    assert power.dtype == dtype
    assert power.isfinite().all()
    assert (power >= 0).all()
    assert ((drowning_time(power) >= 0) & (drowning_time(power) < 1)).all()


def test_what_has_no_spectrum_is_named() -> None:
    for shape in ((5,), (0, 4), (2, 3, 4, 0)):
        with pytest.raises(ValueError, match="x must have a height and a width"):
            radial_power(torch.zeros(shape))
    with pytest.raises(ValueError, match="power must be within"):
        drowning_time(torch.tensor([-1.0]))
    assert radial_power(torch.ones(4, 4).bfloat16()).dtype == torch.float32
