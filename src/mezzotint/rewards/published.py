"""What the published rewards share: reading networks of transformers, seeing pictures as these do, and their heads."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.errors import UserError
from mezzotint.weights.files import read_file

M = TypeVar("M", bound=torch.nn.Module)


def pretrained(kind: str, place: str, **options: Any) -> Any:
    """An object of a class of transformers from a folder or a hub's id; networks frozen. UserError in one line where that fails."""
    import transformers

    if Path(place).is_dir():
        options["local_files_only"] = True
    try:
        with torch.device("cpu"):  # on another one transformers asks for accelerate
            read = getattr(transformers, kind).from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(f"cannot read a reward's {kind} from {place!r} ({reason}); only safetensors are read") from error
    return read.requires_grad_(False).eval() if isinstance(read, torch.nn.Module) else read


def network(kind: str, place: str) -> Any:
    """A network of transformers from safetensors in float32."""
    return pretrained(kind, place, use_safetensors=True, dtype=torch.float32)


def beside(model: M, images: Tensor) -> M:
    """A network on the device of pictures, where it stays: nobody else moves a reward there."""
    return model if next(model.parameters()).device == images.device else model.to(images.device)


class Eye:
    """Pictures as published networks see them: side x side, bicubic, by the mean and deviation of their image processor; differentiable.

    cut: whether of a picture that is not square the middle is seen, or all of it, squeezed. Where we differ: their processors resize bytes.
    """

    def __init__(self, place: str, side: int, cut: bool = True) -> None:
        processor = pretrained("AutoImageProcessor", place)
        self.side, self.cut = side, cut
        self.mean, self.std = (torch.tensor(each, device="cpu") for each in (processor.image_mean, processor.image_std))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, side, side) of images (B, 3, H, W) in [-1, 1]."""
        x = images.float().clamp(-1, 1).add(1).div(2)
        height, width = x.shape[-2:]
        short = min(height, width)
        size = (self.side * height // short, self.side * width // short) if self.cut else (self.side, self.side)
        if size != (height, width):
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        x = x[..., top : top + self.side, left : left + self.side]
        self.mean, self.std = self.mean.to(x), self.std.to(x)
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


def head(place: str) -> Callable[[Tensor], Tensor]:
    """A stack of linear layers (B, D) -> (B,) from a safetensors file with "NAME.weight" and "NAME.bias" of each, in the order of names.

    The published ones (ImageReward, the aesthetic predictor) have nothing but dropout between their layers, which counts in training only.
    UserError where a layer does not fit the one before.
    """
    tensors = dict(read_file(Path(place)).items())
    names = sorted((name.removesuffix(".weight") for name in tensors if name.endswith(".weight")), key=_place)
    layers = [(tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()) for name in names]
    widths = [weight.shape for weight, _ in layers]
    if not widths or widths[-1][0] != 1 or any(before[0] != after[1] for before, after in pairwise(widths)):
        raise UserError(f"{place} holds no stack of linear layers that ends in one number: {[tuple(width) for width in widths]}")

    def score(x: Tensor) -> Tensor:
        layers[:] = [(weight.to(x), bias.to(x)) for weight, bias in layers]
        for weight, bias in layers:
            x = F.linear(x, weight, bias)
        return x[:, 0]

    return score


def _place(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def tokens(tokenizer: Any, prompts: Sequence[str], length: int, device: torch.device) -> Any:
    """Prompts as a tokenizer's numbers, padded and cut to `length`."""
    return tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(device)
