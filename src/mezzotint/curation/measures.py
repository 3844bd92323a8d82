"""What can be measured of a picture in a millisecond, from its pixels alone. All are functions of a decoded picture.

A picture is RGB, made smaller to a longer side of a few hundred pixels (`data.decode.bounded`): the measures are then about what a model
that trains at such a size sees, and the same for a large and a small copy. A picture that is smaller already is measured as it is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HARDEST = 0.995
NEAR = 12  # levels of 0..255 within which colours count as one
CALM = 24  # levels beyond which an edge counts no more, when repetitions are looked for
PATCH, STEP = 256, 16  # pixels: side of the part in which they are looked for, and the shortest repetition that is one
Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Measures:
    """sharpness: variance of the Laplacian, levels squared. edge: how hard the hardest edges are, whatever the contrast. entropy: of the
    grey levels, 0 to 8 bits. flatness: share of the picture that has its commonest colour. brightness, contrast: mean and standard
    deviation of the grey levels, as shares of white. colour: mean distance of the largest from the smallest of a pixel's red, green and
    blue, as a share of white. tiling: how much repeats, 0 to 1.
    """

    sharpness: float
    edge: float
    entropy: float
    flatness: float
    brightness: float
    contrast: float
    colour: float
    tiling: float


def measure(picture: Image.Image) -> Measures:
    """All measures of an RGB picture."""
    levels = picture.convert("L")
    grey = np.asarray(levels)
    share = np.asarray(levels.histogram()) / grey.size
    steps = np.arange(256) / 255
    brightness = float(share @ steps)
    bands = [np.asarray(band) for band in picture.split()]
    colour: Grey = np.subtract(np.maximum.reduce(bands), np.minimum.reduce(bands))
    detail = laplacian(grey)
    return Measures(
        sharpness=float(detail.var(dtype=np.float64)) if detail.size else 0.0,
        edge=edge(detail, share),
        entropy=entropy(share),
        flatness=flatness(bands),
        brightness=brightness,
        contrast=max(0.0, float(share @ steps**2) - brightness**2) ** 0.5,
        colour=float(colour.mean() / 255),
        tiling=tiling(detail),
    )


def laplacian(grey: Grey) -> NDArray[np.int16]:
    """The sum of the four neighbours minus four times the pixel, of all pixels that have four: (H - 2, W - 2)."""
    x = grey.astype(np.int16)
    return x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]


def edge(detail: NDArray[np.int16], share: NDArray[np.float64]) -> float:
    """The Laplacian's size, at the `HARDEST` of its quantiles, over the range of the grey levels without a hundredth at each end.

    A step gives 1, a line 2, a step under a blur of one pixel about 0.2. What is drawn softly, as a cloud is, has a hard edge somewhere.
    """
    if not detail.size:
        return 0.0
    hardest = np.searchsorted(np.bincount(np.abs(detail).ravel()).cumsum(), HARDEST * detail.size)
    low, high = np.searchsorted(share.cumsum(), (0.01, 0.99))
    return float(hardest / (high - low + 1))


def entropy(share: NDArray[np.float64]) -> float:
    """-sum p log2 p, in bits."""
    p = share[share > 0]
    return float(max(0.0, -(p * np.log2(p)).sum()))


def flatness(bands: list[Grey]) -> float:
    """The share of pixels within `NEAR` levels, in all bands, of the commonest colour: the mean of the fullest of 32 x 32 x 32 cells."""
    red, green, blue = (band.astype(np.uint16) >> 3 for band in bands)
    cells = (red << 10) | (green << 5) | blue
    fullest = cells == np.bincount(cells.ravel()).argmax()
    near = np.ones(fullest.shape, bool)
    for band in bands:
        centre = round(float(band[fullest].mean()))
        near &= np.uint8(min(255, centre + NEAR)) >= band
        near &= band >= np.uint8(max(0, centre - NEAR))
    return float(near.mean())


def tiling(detail: NDArray[np.int16]) -> float:
    """The highest peak of the autocorrelation of fine detail away from its centre: a mark that is laid over a picture again and again.

    The Wiener-Khinchin theorem: the transform of the power spectrum. The spectrum's square root is taken instead, which makes the peaks
    narrow (Tolonen and Karjalainen 2000), and detail is clipped, so that a few strong edges do not outweigh a faint mark.
    """
    if min(detail.shape) < 4 * STEP:
        return 0.0
    part = np.clip(detail[:PATCH, :PATCH], -CALM, CALM).astype(np.float32)
    part -= part.mean()
    if not part.any():
        return 0.0
    height, width = part.shape
    found = np.fft.irfft2(np.abs(np.fft.rfft2(part)), s=part.shape)
    found /= found[0, 0]
    rows, columns = (np.minimum(np.arange(n), n - np.arange(n)) for n in (height, width))
    away = np.maximum(rows[:, None], columns[None, :]) >= STEP
    return float(np.clip(found[away].max(), 0, 1))
