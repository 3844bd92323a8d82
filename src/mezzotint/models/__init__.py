"""Where it fits: the networks. Each takes (x, t, cond) and gives a prediction of x's shape.

In: one file per architecture, built from a shared vocabulary (attention, blocks, embed, cond); published sizes by name (PRESETS).
Out: noise schedules, losses, sampling, sharding, files: a model knows nothing of them.
Gotchas: an image is a video of one frame; positions have three axes and the first idles.
"""

from collections.abc import Callable
from typing import Any

from mezzotint.models import flux, mmdit, pixart, sana, unet
from mezzotint.models.cond import Cond
from mezzotint.models.dit import DiT, DiTConfig
from mezzotint.models.flux import Flux, FluxConfig
from mezzotint.models.mmdit import MMDiT, MMDiTConfig
from mezzotint.models.pixart import PixArt, PixArtConfig
from mezzotint.models.sana import Sana, SanaConfig
from mezzotint.models.unet import UNet, UNetConfig

PRESETS: dict[str, Callable[[], Any]] = {**mmdit.PRESETS, **flux.PRESETS, **pixart.PRESETS, **sana.PRESETS, **unet.PRESETS}

__all__ = [
    "PRESETS",
    "Cond",
    "DiT",
    "DiTConfig",
    "Flux",
    "FluxConfig",
    "MMDiT",
    "MMDiTConfig",
    "PixArt",
    "PixArtConfig",
    "Sana",
    "SanaConfig",
    "UNet",
    "UNetConfig",
]
