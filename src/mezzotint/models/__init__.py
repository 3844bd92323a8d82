"""Where it fits: the networks. Each takes (x, t, cond) and gives a prediction of x's shape.

In: one file per architecture, built from a shared vocabulary (attention, blocks, embed, cond); published sizes by name (PRESETS);
adapters on any of them (`models.lora`, which needs the extra "lora").
Out: noise schedules, losses, sampling, sharding, files: a model knows nothing of them.
Gotchas: an image is a video of one frame; positions have three axes and the first idles.
"""

from collections.abc import Callable

from mezzotint.models import class_dit, flux, fuse_dit, hidream, lumina2, mmdit, pixart, sana, simple_uvit, transfusion, unet, uvit
from mezzotint.models.class_dit import ClassDiT, ClassDiTConfig
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.dit import DiT, DiTConfig
from mezzotint.models.dit_air import DiTAir, DiTAirConfig
from mezzotint.models.flux import Flux, FluxConfig
from mezzotint.models.fuse_dit import FuseDiT, FuseDiTConfig
from mezzotint.models.hidream import HiDream, HiDreamConfig
from mezzotint.models.lumina2 import Lumina2, Lumina2Config
from mezzotint.models.mmdit import MMDiT, MMDiTConfig
from mezzotint.models.pixart import PixArt, PixArtConfig
from mezzotint.models.sana import Sana, SanaConfig
from mezzotint.models.simple_uvit import SimpleUViT, SimpleUViTConfig
from mezzotint.models.transfusion import Transfusion, TransfusionConfig
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.models.uvit import UViT, UViTConfig

PRESETS: dict[str, Callable[[], DenoiserConfig]] = {
    **unet.PRESETS,
    **uvit.PRESETS,
    **simple_uvit.PRESETS,
    **class_dit.PRESETS,
    **pixart.PRESETS,
    **sana.PRESETS,
    **mmdit.PRESETS,
    **flux.PRESETS,
    **lumina2.PRESETS,
    **hidream.PRESETS,
    **transfusion.PRESETS,
    **fuse_dit.PRESETS,
}

__all__ = [
    "PRESETS",
    "ClassDiT",
    "ClassDiTConfig",
    "Cond",
    "DenoiserConfig",
    "DiT",
    "DiTAir",
    "DiTAirConfig",
    "DiTConfig",
    "Flux",
    "FluxConfig",
    "FuseDiT",
    "FuseDiTConfig",
    "HiDream",
    "HiDreamConfig",
    "Lumina2",
    "Lumina2Config",
    "MMDiT",
    "MMDiTConfig",
    "PixArt",
    "PixArtConfig",
    "Sana",
    "SanaConfig",
    "SimpleUViT",
    "SimpleUViTConfig",
    "Transfusion",
    "TransfusionConfig",
    "UNet",
    "UNetConfig",
    "UViT",
    "UViTConfig",
]
