"""Perceptual hashes: what finds a picture again that was resized, compressed anew, cropped a little, brightened or mirrored.

The fingerprint of a picture is a small copy of it: 32 x 32 grey levels, and 16 x 16 of each colour difference. Two things are read from it.
A sketch is what pHash (Zauner 2010) takes the signs of, the low cosine coefficients of the grey levels, kept as numbers and weighted
by their frequency, since those of pictures fall off with it. Crops change it; so sketches are taken of several windows of a picture as
well, one of which comes close to any small crop. That gives candidates. They are then laid over one another to a fraction of a pixel (Lucas
and Kanade 1981, in the inverse form of Baker and Matthews 2004, with a gain and an offset for brightness), and are the same if what
differs is small everywhere: a face with another mouth is another picture.

N pictures, W windows, D = 55 coefficients, P = 32 pixels along a side.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mezzotint.curation.stage import Compute, Stage
from mezzotint.data.decode import UnusableError, opened, to_rgb

if TYPE_CHECKING:
    import pyarrow as pa

LUMA, CHROMA = 32, 16  # pixels along a side
BYTES = LUMA * LUMA + 2 * CHROMA * CHROMA
DRAFT = 4 * LUMA  # JPEG files are decoded at the smallest scale that has as many pixels along a side
FREQUENCIES = 8
HELD = 120  # grey levels from the middle within which a sensor or a file holds all light
FINE = 1.0  # pixels of blur: what is finer depends on where the grid of the small copy lay
BLOCK, BORDER = 4, 2  # pixels
PIXEL = 0.4  # variance of the light that a pixel gathers, in pixels squared
EQUAL = 8.0  # grey levels by which blocks of equal pictures may differ
FLAT = 2.0  # standard deviation, in grey levels, under which there is nothing to recognise a picture by
# What a window cuts off at both ends of an axis, as shares of it. Ends of any crop of up to a tenth are within 4% of those of one.
CUTS = ((0.0, 0.0), (0.08, 0.02), (0.02, 0.08), (0.08, 0.08))

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass
class Fingerprints(Stage, kind="fingerprints"):
    """The fingerprint of each picture; null where there is none that can be decoded."""

    reads: ClassVar[tuple[str, ...]] = ("content",)

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        return pa.schema([pa.field("fingerprint", pa.binary(BYTES))])

    def open(self) -> Compute:
        import pyarrow as pa

        def compute(batch: pa.RecordBatch) -> pa.RecordBatch:
            prints = [None if not content else _fingerprint_of(content) for content in batch["content"].to_pylist()]
            return pa.record_batch([pa.array(prints, pa.binary(BYTES))], names=["fingerprint"])

        return compute


def _fingerprint_of(content: bytes) -> bytes | None:
    try:
        with opened(content) as image:
            image.draft(None, (DRAFT, DRAFT))
            return fingerprint(to_rgb(ImageOps.exif_transpose(image)))
    except UnusableError:
        return None


def fingerprint(image: Image.Image) -> bytes:
    """Of an RGB picture, squeezed to a square: `BYTES` bytes, row by row."""
    luma, *colour = image.resize((LUMA, LUMA), Image.Resampling.BILINEAR).convert("YCbCr").split()
    return b"".join([luma.tobytes(), *(channel.resize((CHROMA, CHROMA), Image.Resampling.BOX).tobytes() for channel in colour)])


def windows() -> Floats:
    """(W, 4): left, right, top, bottom of each window, as shares of the picture cut off. The first is the whole picture."""
    return np.array([(*x, *y) for y in CUTS for x in CUTS], np.float32)


def sketches(prints: Bytes, whole: bool = False) -> Floats:
    """(N, W, D) unit sketches of fingerprints (N, BYTES); of the whole picture only, W = 1, if asked. Zeros where a picture is flat."""
    luma = prints[:, : LUMA * LUMA].reshape(-1, LUMA, LUMA).astype(np.float32)
    cosines, taken = _cosines()
    cosines = cosines[:1] if whole else cosines
    flat = cosines.reshape(-1, LUMA)
    every = (flat @ luma @ flat.T).reshape(len(luma), len(cosines), FREQUENCIES, len(cosines), FREQUENCIES)
    found = every.transpose(0, 1, 3, 2, 4).reshape(len(luma), len(cosines) ** 2, FREQUENCIES**2)
    found = found[..., taken] * _frequency().ravel()[taken]
    norm = np.linalg.norm(found, axis=-1, keepdims=True)
    plain = luma.std(axis=(1, 2)) < FLAT
    return np.where(plain[:, None, None], 0, found / np.maximum(norm, 1e-6)).astype(np.float32)


def mirrored_sketches(found: Floats) -> Floats:
    """The sketches of mirrored pictures, of the mirrored windows: those of odd frequency along the width change their sign."""
    odd = np.indices((FREQUENCIES, FREQUENCIES))[1].ravel()[_cosines()[1]] % 2
    return found * (1 - 2 * odd).astype(np.float32)


@cache
def _cosines() -> tuple[Floats, NDArray[np.bool_]]:
    """For each window along an axis, the cosines (windows, FREQUENCIES, P) that read it; and which products of two are taken."""
    pixel = np.arange(LUMA)
    rows = []
    for before, after in CUTS:
        first, last = before * LUMA, (1 - after) * LUMA
        share = np.clip(np.minimum(pixel + 1, last) - np.maximum(pixel, first), 0, 1) / (last - first)
        place = (np.clip(pixel + 0.5, first, last) - first) / (last - first)
        rows.append(np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * place) * share)
    taken = (_frequency() > 0) & (_frequency() < FREQUENCIES)
    return np.stack(rows).astype(np.float32), taken.ravel()


def _frequency() -> Floats:
    axis = np.arange(FREQUENCIES, dtype=np.float32)
    return np.hypot(axis[:, None], axis)


def mirrored(prints: Bytes) -> Bytes:
    """The fingerprints of the mirrored pictures."""
    luma, *colour = _channels(torch.tensor(prints))
    return np.concatenate([x.flip(-1).flatten(1).numpy() for x in (luma, *colour)], axis=1)


def _channels(prints: Tensor) -> list[Tensor]:
    luma, blue, red = prints.split([LUMA * LUMA, CHROMA * CHROMA, CHROMA * CHROMA], dim=1)
    return [luma.unflatten(1, (LUMA, LUMA)), blue.unflatten(1, (CHROMA, CHROMA)), red.unflatten(1, (CHROMA, CHROMA))]


def alike(prints: Bytes, others: Bytes, cuts: Floats) -> NDArray[np.bool_]:
    """(N,) whether others (N, BYTES) are pictures (N, BYTES), or windows of them near `cuts` (N, 4)."""
    found = differences(prints, others, cuts)
    some = np.minimum(4 + 0.12 * found["contrast"], 0.4 * found["contrast"])
    same_light = (found["gain"] > 0.6) & (found["gain"] < 1.6)
    result: NDArray[np.bool_] = same_light & (found["luma"] < some) & (found["chroma"] < 12) & (found["outside"] < 0.03)
    return result


def equal(prints: Bytes, others: Bytes) -> NDArray[np.bool_]:
    """(N,) whether others (N, BYTES) are pictures (N, BYTES) as they are, whole and in the same light, but for size and compression.

    What differs must be small in every block: for light, the root mean square of 4 x 4; for colour, the mean of 2 x 2, since files
    keep colours coarsely. A flat drawing has no texture, so that a sign of another shape or colour is beyond this.
    """
    one, other = (_channels(torch.tensor(x)) for x in (prints, others))
    luma, *colour = (a.float() - b.float() for a, b in zip(one, other, strict=True))
    light = F.avg_pool2d(luma[:, None].square(), BLOCK).amax((1, 2, 3)).sqrt()
    chroma = F.avg_pool2d(torch.stack(colour, dim=1), BLOCK // 2).abs().amax((1, 2, 3))
    result: NDArray[np.bool_] = ((light < EQUAL) & (chroma < EQUAL)).numpy()
    return result


def differences(prints: Bytes, others: Bytes, cuts: Floats) -> dict[str, Floats]:
    """How others (N, BYTES) differ from windows of pictures (N, BYTES), near those cut out by `cuts` (N, 4), when laid over them.

    gain: of the brightness, 1 if it is the same. contrast: standard deviation, in grey levels. luma: the largest root mean square of
    differences in a block of 8 x 8. chroma: the largest mean difference in a block of 4 x 4, of either colour.
    outside: how far the window lies outside of the picture, as a share of its side.
    """
    picture, *picture_colour = (x.float() for x in _channels(torch.tensor(prints)))
    other, *other_colour = (x.float() for x in _channels(torch.tensor(others)))
    place = torch.from_numpy(np.stack([cuts[:, ::2], 1 - cuts[:, ::2] - cuts[:, 1::2]], axis=1))
    for blur in (2.0, FINE):  # the wide one for those that are far apart
        place = _aligned(_blurred(picture, blur), _blurred(other, blur), place)
    seen, other = (_inner(x) for x in _in_focus(picture, other, place))
    gain, error = _explained(seen, other)
    colours = []
    for one, two in zip(picture_colour, other_colour, strict=True):
        one, two = (_inner(x) for x in _in_focus(one - 128, two - 128, place))
        colours.append(F.avg_pool2d((one - gain[:, None, None] * two)[:, None], BLOCK).abs().amax((1, 2, 3)))
    result = {
        "gain": gain,
        "luma": F.avg_pool2d(error[:, None].square(), BLOCK).amax((1, 2, 3)).sqrt(),
        "contrast": seen.std((1, 2)),
        "chroma": torch.stack(colours).amax(0),
        "outside": torch.stack([-place[:, 0], place.sum(1) - 1]).amax((0, 2)),
    }
    return {name: x.numpy() for name, x in result.items()}


def _explained(seen: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The gain (N,) by which `other` becomes `seen`, and what that leaves; light that one of them could not hold explains itself."""
    held = ((seen - 127.5).abs() < HELD) & ((other - 127.5).abs() < HELD)
    weight = held + 1e-3
    weight = weight / weight.sum((1, 2), keepdim=True)
    mean, other_mean = ((weight * x).sum((1, 2), keepdim=True) for x in (seen, other))
    spread = other - other_mean
    gain = (weight * spread * (seen - mean)).sum((1, 2)) / (weight * spread.square()).sum((1, 2)).clamp_min(1e-6)
    error = seen - (mean + gain[:, None, None] * spread).clamp(0, 255)
    error = torch.where(other > 127.5 + HELD, error.clamp_max(0), error)
    return gain, torch.where(other < 127.5 - HELD, error.clamp_min(0), error)


def _inner(x: Tensor) -> Tensor:
    """Without the border, where the blur of the one sees what the other lacks."""
    return x[..., BORDER:-BORDER, BORDER:-BORDER]


def _in_focus(picture: Tensor, other: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The window of a picture and the other, as sharp as each other: a pixel of the window is a larger part of what both show."""
    window = _look(_blurred(picture, FINE), place)
    scale = place[:, 1].clamp(0.5, 1.0)
    wider = ((PIXEL + FINE**2) / scale.square() - PIXEL).sqrt()
    return window, _blurred(other, wider)


def _blurred(x: Tensor, deviation: Tensor | float) -> Tensor:
    """Pictures (N, P, P) under a Gaussian. deviation: in pixels, or (N, 2) along x and along y."""
    wide = (
        torch.as_tensor(deviation).expand(-1, 2)[..., None, None] if isinstance(deviation, Tensor) else torch.full((1, 2, 1, 1), deviation)
    )
    place = torch.arange(x.shape[1], dtype=torch.float32)
    weight = torch.exp(-0.5 * ((place[:, None] - place) / wide).square())
    weight = weight / weight.sum(-1, keepdim=True)
    return weight[:, 1] @ x @ weight[:, 0].mT


def _look(x: Tensor, place: Tensor) -> Tensor:
    """Windows of pictures (N, P, P). place: (N, 2, 2), where a window begins and how long it is, along x and along y."""
    grid = (torch.arange(x.shape[1]) + 0.5) / x.shape[1]
    along = 2 * (place[:, 0, :, None] + place[:, 1, :, None] * grid) - 1
    points = torch.stack([along[:, 0, None, :].expand(-1, len(grid), -1), along[:, 1, :, None].expand(-1, -1, len(grid))], dim=-1)
    return F.grid_sample(x[:, None], points, padding_mode="border", align_corners=False)[:, 0]


def _aligned(picture: Tensor, other: Tensor, place: Tensor, steps: int = 4) -> Tensor:
    """(N, 2, 2) places of the windows of `picture` that look most like `other`, near those given.

    Each step solves window = offset + gain * other + d/dx other * (a + b x) + d/dy other * (c + d y) by least squares, and moves it.
    """
    dy, dx = torch.gradient(other, spacing=1 / LUMA, dim=(1, 2))
    grid = (torch.arange(LUMA) + 0.5) / LUMA
    terms = torch.stack([torch.ones_like(other), other, dx, dx * grid, dy, dy * grid[:, None]], dim=1).flatten(2)
    scale = terms.square().mean(2, keepdim=True).sqrt().clamp_min(1e-6)
    counted = F.pad(_inner(torch.ones(LUMA, LUMA)), (BORDER,) * 4).flatten() / LUMA**2
    terms = terms / scale
    normal = (terms * counted) @ terms.mT + 1e-4 * torch.eye(6)
    for _ in range(steps):
        seen = _look(picture, place).flatten(1)
        found = torch.linalg.solve(normal, (terms * counted) @ seen[..., None]) / scale
        shift = (found[:, 2:, 0] / found[:, 1].clamp_min(0.3)).unflatten(1, (2, 2)).clamp(-0.05, 0.05)  # axis; at 0, slope
        place = torch.stack([place[:, 0] - place[:, 1] * shift[..., 0], place[:, 1] * (1 - shift[..., 1])], dim=1)
    return place
