"""How pictures are fitted into a shape."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mezzotint.data.decode import fitted


def natural(width: int, height: int) -> Image.Image:
    """Smooth coloured noise, whose detail falls off with frequency as in photographs."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = [np.fft.irfft2(rng.normal(size=(2, *frequency.shape)).T.dot([1, 1j]).T / frequency, s=(height, width)) for _ in range(3)]
    pixels = np.stack(planes, axis=2)
    return Image.fromarray((pixels / pixels.std() * 50 + 128).clip(0, 255).astype(np.uint8))


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def error(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Root of the mean squared difference, in grey levels."""
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 48), (40, 80), (200, 150)])
def test_a_jpeg_that_is_shrunk_while_it_is_decoded_looks_the_same(width: int, height: int) -> None:
    image = natural(512, 400)  # whose middle begins at a whole pixel when it is shrunk, too
    shrunk, whole = fitted(stored(image, "JPEG", quality=95, subsampling=0), width, height), fitted(stored(image, "PNG"), width, height)
    assert shrunk.shape == whole.shape == (height, width, 3)
    assert error(shrunk, whole) < 5
    assert error(np.roll(shrunk, 1, axis=1), whole) > 2 * error(shrunk, whole)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_the_cut_lies_at_its_place(kind: str, place: float) -> None:
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    pixels[:, int(200 * place) : int(200 * place) + 100] = 255
    assert fitted(stored(Image.fromarray(pixels), kind, quality=100), 50, 50, (place, 0.3))[:, 2:-2].min() > 240
    assert fitted(stored(Image.fromarray(pixels).rotate(90, expand=True), kind, quality=100), 50, 50, (0.3, 1 - place))[2:-2].min() > 240


def test_pictures_are_turned_upright_before_they_are_cut() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored top row is the right-hand side
    image = natural(400, 200)
    turned = fitted(stored(image, "JPEG", quality=95, exif=exif), 40, 80)
    assert error(turned, fitted(stored(image.transpose(Image.Transpose.ROTATE_270), "PNG"), 40, 80)) < 5


def test_small_pictures_are_enlarged() -> None:
    assert fitted(stored(Image.new("L", (3, 5), 77), "JPEG"), 40, 16).shape == (16, 40, 3)
