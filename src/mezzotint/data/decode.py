"""Where it fits: the one door by which the bytes of strangers become pixels.

In: an image file, or the bytes of one. Out: an upright RGB picture, or `UnusableError` with the reason.
Gotchas: only the first frame of an animation is read. Colour profiles are ignored. JPEG decoders differ by a grey level now and then.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow may read no other format: some of its decoders start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 1 << 26  # 64 megapixels, as cameras count them, are within it
SPARE = 1.5  # how many times larger than it will be a picture is decoded at least, where its decoder can shrink it: less looks worse
TURNED = (5, 6, 7, 8)  # orientations (EXIF) of pictures that lie on their side
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Whoever reads a million files does not want to hear of each damaged EXIF.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnusableError(Exception):
    """An image must be set aside; the message is the reason: its kind, then often a colon and the details."""


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An image whose header is read, its pixels not yet. Whatever goes wrong within, also in decoding, is an `UnusableError`."""
    file: Path | BinaryIO = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow warns at a limit that is above ours
        raise UnusableError(f"too large: more than {MAX_PIXELS >> 20} megapixels") from None
    except UnidentifiedImageError:
        empty = not (source.stat().st_size if isinstance(source, Path) else source)
        raise UnusableError("empty file" if empty else f"not an image: its header is none of {', '.join(FORMATS)}") from None
    except PermissionError:
        raise UnusableError("no permission to read") from None
    except Exception as error:
        # Damaged files make Pillow raise all sorts of things, from SyntaxError to struct.error.
        raise UnusableError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def decode(source: Path | bytes) -> Image.Image:
    """The whole picture, upright (EXIF), in RGB, laid over white where it is transparent."""
    with opened(source) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def bounded(image: Image.Image, side: int) -> Image.Image:
    """`decode` of an `opened` image, and its longer side resized to `side` where it is longer. UnusableError comes from `opened`.

    A JPEG is decoded at a half, a quarter or an eighth of its size where that is enough, which takes less than half of the time and still
    reads all of its data: what cannot be decoded whole cannot be decoded so.
    """
    share = side / max(image.size)
    if share < 1:
        image.draft(None, (round(image.width * share), round(image.height * share)))
    picture = to_rgb(ImageOps.exif_transpose(image))
    picture.thumbnail((side, side))
    return picture


def square(source: Path | bytes, size: int) -> NDArray[np.uint8]:
    """The centred square of a picture, its shorter side resized to `size` by Lanczos' filter. Returns (3, size, size)."""
    return channels_first(ImageOps.fit(decode(source), (size, size), Image.Resampling.LANCZOS))


def fitted(source: Path | bytes, width: int, height: int, place: tuple[float, float] = (0.5, 0.5)) -> NDArray[np.uint8]:
    """A picture resized so that both sides cover width and height, and cut to them: (height, width, 3).

    place: of the cut within what is left over, from left and from top, 0..1, rounded to pixels of what was decoded. JPEG is shrunk as it is
    decoded, by a power of two, where what comes out is still `SPARE` times larger than it has to be: a good deal faster, and not quite
    the same pixels as `square`.
    """
    with opened(source) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        sides = (height, width) if turned else (width, height)
        scale = SPARE * max(least / side for least, side in zip(sides, image.size, strict=True))
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        ImageOps.exif_transpose(image, in_place=True)
        plain = image if image.mode == "RGB" and not image.has_transparency_data else to_rgb(image)
        pixels = torch.from_numpy(np.array(plain))
    scale = min(pixels.shape[1] / width, pixels.shape[0] / height)
    across, down = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = round(place[0] * (pixels.shape[1] - across)), round(place[1] * (pixels.shape[0] - down))
    cut = pixels[top : top + down, left : left + across].permute(2, 0, 1)[None]
    # Pillow's filter, three times as fast on bytes.
    resized = F.interpolate(cut, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def channels_first(image: Image.Image) -> NDArray[np.uint8]:
    """(3, H, W) of an RGB picture."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit grey keeps its upper eight bits, transparent pixels are laid over white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is unknown")
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(coloured)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels 0..65535, which Pillow would clip at 255, to 0..255."""
    grey = np.array(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit pixels, whose white is unknown")
    if "transparency" in image.info:  # of 16-bit PNG: the one grey level that is transparent
        grey[grey == image.info["transparency"]] = 65535
    return Image.fromarray((grey >> 8).astype(np.uint8))
