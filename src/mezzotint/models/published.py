"""What the presets were published for: the size of picture that they draw, the text that they read, and where they come from."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mezzotint.models import PRESETS
from mezzotint.models.cost import flops


@dataclass(frozen=True)
class Published:
    """pixels: sides of the picture. factor: pixels along a side for each of x, 1 where the network draws pixels and not latents.
    text: tokens of a text of full length, or for Transfusion, which has no such thing, of a long caption. source: who published it.
    """

    pixels: int
    factor: int
    text: int
    source: str


PUBLISHED: dict[str, Published] = {
    "sd1.5": Published(512, 8, 77, "Rombach et al. 2022"),
    "sdxl": Published(1024, 8, 77, "Podell et al. 2023"),
    "uvit-h-2": Published(256, 8, 0, "Bao et al. 2023"),
    "uvit-l-2": Published(256, 8, 0, "Bao et al. 2023"),
    "uvit-m-4": Published(64, 1, 0, "Bao et al. 2023"),
    "uvit-s-2": Published(32, 1, 0, "Bao et al. 2023"),
    "uvit-s-2-text": Published(256, 8, 77, "Bao et al. 2023"),
    "uvit-s-2-deep": Published(256, 8, 77, "Bao et al. 2023"),
    "simple-uvit-128": Published(128, 1, 0, "Hoogeboom et al. 2023"),
    "simple-uvit-256": Published(256, 1, 0, "Hoogeboom et al. 2023"),
    "simple-uvit-512": Published(512, 1, 0, "Hoogeboom et al. 2023"),
    "dit-xl-2": Published(256, 8, 0, "Peebles & Xie 2023"),
    "dit-xl-2-512": Published(512, 8, 0, "Peebles & Xie 2023"),
    "dit-l-2": Published(256, 8, 0, "Peebles & Xie 2023"),
    "dit-b-2": Published(256, 8, 0, "Peebles & Xie 2023"),
    "dit-s-2": Published(256, 8, 0, "Peebles & Xie 2023"),
    "pixart-alpha-1024": Published(1024, 8, 120, "Chen et al. 2023"),
    "pixart-alpha-512": Published(512, 8, 120, "Chen et al. 2023"),
    "pixart-alpha-256": Published(256, 8, 120, "Chen et al. 2023"),
    "pixart-sigma": Published(1024, 8, 300, "Chen et al. 2024"),
    "sana-1600m": Published(1024, 32, 300, "Xie et al. 2024"),
    "sana-600m": Published(1024, 32, 300, "Xie et al. 2024"),
    "sana1.5-1600m": Published(1024, 32, 300, "Xie et al. 2025"),
    "sana1.5-4800m": Published(1024, 32, 300, "Xie et al. 2025"),
    "sd3-medium": Published(1024, 8, 77 + 256, "Esser et al. 2024"),
    "sd3.5-medium": Published(1024, 8, 77 + 256, "Stability AI 2024"),
    "sd3.5-large": Published(1024, 8, 77 + 256, "Stability AI 2024"),
    "flux-dev": Published(1024, 8, 512, "Black Forest Labs 2024"),
    "flux-schnell": Published(1024, 8, 256, "Black Forest Labs 2024"),
    "flux-control": Published(1024, 8, 512, "Black Forest Labs 2024"),
    "flux-fill": Published(1024, 8, 512, "Black Forest Labs 2024"),
    "lumina-image-2": Published(1024, 8, 256, "Qin et al. 2025"),
    "hidream-i1": Published(1024, 8, 128, "Cai et al. 2025"),
    "transfusion-7b": Published(256, 8, 64, "Zhou et al. 2024"),
    "transfusion-1400m": Published(256, 8, 64, "Zhou et al. 2024"),
    "transfusion-760m": Published(256, 8, 64, "Zhou et al. 2024"),
    "transfusion-370m": Published(256, 8, 64, "Zhou et al. 2024"),
    "transfusion-160m": Published(256, 8, 64, "Zhou et al. 2024"),
    "fuse-dit-2b": Published(512, 8, 256, "Tang et al. 2025"),
}


class Unset(TorchFunctionMode):
    """Leaves weights as they are where a network would give them their start, which takes most of the time of building one."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (*arguments, *keywords.values())[0]
        return function(*arguments, **keywords)


def parameters(config: Any) -> int:
    """Parameters of the network that a configuration describes, of which nothing is allocated."""
    with torch.device("meta"), Unset():
        net = config.build()
    return sum(prod(p.shape) for p in net.parameters())


def described(name: str) -> dict[str, Any]:
    """A preset as plain data: what it is, its parameters, and the operations of one forward at the size that it was published for."""
    config: Any = PRESETS[name]()
    made = PUBLISHED[name]
    tokens = (made.pixels // made.factor // config.patch) ** 2
    return {
        "name": name,
        "architecture": config.kind,
        "parameters": parameters(config),
        "flops": flops(config, tokens, made.text),
        "pixels": made.pixels,
        "text": made.text,
        "source": made.source,
    }
