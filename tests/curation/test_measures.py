"""Measures of pictures whose values are known in closed form, and what they must do on pictures in general."""

import io
import math
import random

import numpy as np
import pytest
from dirty import photo, truncated
from PIL import Image, ImageFilter

from mezzotint.curation.measures import entropy, laplacian, measure, tiling
from mezzotint.data.decode import UnusableError, bounded, decode, opened


def shades(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def within(content: bytes, side: int) -> Image.Image:
    with opened(content) as image:
        return bounded(image, side)


def jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def test_the_laplacian_of_a_paraboloid_is_four_and_of_a_plane_zero() -> None:
    x, y = np.mgrid[-7:8, -7:8]
    assert (laplacian((x**2 + y**2).astype(np.uint8)) == 4).all()
    assert not laplacian((10 + 3 * (x + 7) + 2 * (y + 7)).astype(np.uint8)).any()


def test_sharpness_of_a_chessboard_is_that_of_its_only_two_values() -> None:
    board = measure(shades(100 + 10 * (np.indices((10, 10)).sum(0) % 2)))
    assert board.sharpness == 40.0**2
    assert board.contrast == pytest.approx(5 / 255)
    assert board.brightness == pytest.approx(105 / 255)
    assert board.entropy == pytest.approx(1.0)


def test_entropy_of_all_levels_alike_is_eight_bits() -> None:
    assert measure(shades(np.arange(256).reshape(16, 16))).entropy == pytest.approx(8.0)
    assert entropy(np.array([0.5, 0.25, 0.25])) == pytest.approx(1.5)
    assert measure(shades(np.full((5, 5), 77))).entropy == 0.0


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_flatness_is_the_share_of_the_commonest_colour(share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100))
    pixels[: int(100 * share)] = 200 + np.arange(100) % 5  # nearly one level
    other = (1 - share) * 25 / 256  # of the rest lies within the same levels
    assert measure(shades(pixels)).flatness == pytest.approx(share + other, abs=0.03)


def test_colour_is_nothing_in_grey_pictures() -> None:
    assert measure(photo(0, 64, 48).convert("L").convert("RGB")).colour == 0.0
    assert measure(Image.new("RGB", (4, 4), (255, 0, 51))).colour == 1.0


def test_what_repeats_is_told_from_what_does_not() -> None:
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (32, 32))
    noise = rng.integers(0, 256, (256, 256))
    assert tiling(laplacian(np.tile(tile, (8, 8)).astype(np.uint8))) > 0.4
    assert tiling(laplacian(noise.astype(np.uint8))) < 0.05


def test_blur_lowers_sharpness_step_by_step() -> None:
    picture = photo(3, 192, 128)
    found = [measure(picture.filter(ImageFilter.GaussianBlur(radius))).sharpness for radius in (0, 0.5, 1, 2, 4)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] / 20


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (3, 3), (65, 66)])
def test_all_sizes_have_finite_measures(size: tuple[int, int]) -> None:
    for pixels in (np.zeros(size), np.random.default_rng(1).integers(0, 256, size)):
        assert all(math.isfinite(value) for value in vars(measure(shades(pixels))).values())


def test_a_bounded_picture_is_the_decoded_one_made_smaller() -> None:
    picture = photo(5, 400, 304)
    content = jpeg(picture, quality=95)
    small, whole = within(content, 100), decode(content)
    assert small.size == (100, 76)
    reference = whole.resize((100, 76), Image.Resampling.BICUBIC, reducing_gap=2.0)
    assert np.abs(np.asarray(small, float) - np.asarray(reference, float)).mean() < 4
    assert np.array_equal(np.asarray(within(content, 400)), np.asarray(whole))


def test_a_bounded_picture_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    left = Image.new("RGB", (64, 32), "black")
    left.paste("white", (0, 0, 32, 32))
    small = np.asarray(within(jpeg(left, exif=exif), 16))
    assert small.shape == (16, 8, 3)
    assert small[:6].mean() > 240  # what was on the left is on top
    assert small[-6:].mean() < 15


def test_what_cannot_be_decoded_whole_cannot_be_decoded_small() -> None:
    content = jpeg(photo(7, 200, 160))
    for length in range(2, len(content), len(content) // 37):
        faults = []
        for function in (decode, lambda data: within(data, 32)):
            try:
                function(content[:length])
                faults.append(False)
            except UnusableError:
                faults.append(True)
        assert faults[0] == faults[1]
    with pytest.raises(UnusableError):
        within(truncated(photo(7, 64, 48), random.Random(0)), 16)


@pytest.mark.parametrize(("dark", "bright"), [(0, 255), (100, 140)])
def test_an_edge_is_as_hard_as_its_step_whatever_the_contrast(dark: int, bright: int) -> None:
    step = np.full((64, 64), dark)
    step[:, 32:] = bright
    line = np.full((64, 64), dark)
    line[:, 32] = bright
    hard = [measure(shades(pixels)).edge for pixels in (step, line)]
    assert hard == [pytest.approx(share * (bright - dark) / (bright - dark + 1)) for share in (1, 2)]
    soft = [measure(shades(step).filter(ImageFilter.GaussianBlur(radius))).edge for radius in (1, 2, 4)]
    assert 0.1 < soft[0] < 0.25
    assert sorted(soft, reverse=True) == soft
