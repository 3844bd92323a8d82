"""Where it fits: between tensors and the pictures people look at; the pipeline, previews and reports all go through here.

In: `to_pil`, `from_pil`, `grid`, `png_bytes`, `save`. A pixel x in [-1, 1] is the byte round((x + 1) * 127.5).
Out: files and folders, which their owners read and write; resizing and cropping (`data`).
Gotchas: the way to bytes clamps and rounds; from bytes to tensor and back is exact.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """The picture of a tensor (C, H, W) in [-1, 1], C = 1 (grey) or 3 (RGB), of any floating type, on any device.

    Values outside the range are clamped. Raises ValueError for another shape or type and for a non-finite pixel.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f"image must be floating point of shape (1 or 3, H, W), got {image.dtype} of shape {tuple(image.shape)}")
    if not image.isfinite().all():
        raise ValueError(f"image must be finite; {int(image.isfinite().logical_not().sum())} of its values are not")
    pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())


def from_pil(picture: Image.Image) -> Tensor:
    """The tensor (3, H, W) float32 in [-1, 1] of a picture; other modes are converted to RGB, without their alpha."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] side by side, row by row, each pixel enlarged to scale x scale; black where none is left.

    Raises ValueError for no images, a non-positive `columns` or `scale`, and whatever `to_pil` refuses.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be of shape (N, C, H, W) with N at least 1, got {tuple(images.shape)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    rows = -(-len(images) // columns)
    missing = images.new_full((rows * columns - len(images), *images.shape[1:]), -1)
    cells = torch.cat([images, missing]).unflatten(0, (rows, columns))
    sheet = to_pil(cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def png_bytes(image: Tensor) -> bytes:
    """The PNG file of a tensor (C, H, W) in [-1, 1], as `to_pil` makes it."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return buffer.getvalue()


def save(image: Tensor, path: Path, parameters: str = "") -> None:
    """Write a tensor (C, H, W) as a PNG file, with the text that other tools read from its `parameters` chunk."""
    info = PngInfo()
    if parameters:
        info.add_text("parameters", parameters)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path, format="PNG", pnginfo=info)
