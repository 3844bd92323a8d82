"""Pixel models that train on a laptop: on Worlds, and on a folder of images."""

from dataclasses import dataclass
from typing import Literal

from mezzotint.data.folder import FolderConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.flow.time import TimeDensity
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.models import DiTConfig
from mezzotint.pipeline import PipelineConfig, Sampling
from mezzotint.text import ByteEncoderConfig
from mezzotint.train.optim import OptimConfig
from mezzotint.train.trainer import RunConfig, TrainConfig

SizeName = Literal["xs", "s", "m", "l"]


@dataclass(frozen=True)
class Size:
    """The one dial: width and depth of the model, width of its text encoder, picture side, and how long it trains."""

    width: int
    depth: int
    text: int
    image: int
    batch: int
    steps: int
    lr: float


SIZES: dict[SizeName, Size] = {
    "xs": Size(width=64, depth=2, text=64, image=32, batch=32, steps=120, lr=2e-3),  # seconds: shows that all of it runs
    "s": Size(width=192, depth=4, text=128, image=32, batch=64, steps=5000, lr=4e-3),  # 12 minutes on two cores
    "m": Size(width=384, depth=12, text=256, image=64, batch=256, steps=20_000, lr=1e-3),  # one GPU; not yet run
    "l": Size(width=768, depth=16, text=512, image=128, batch=512, steps=60_000, lr=5e-4),  # one large GPU; not yet run
}
PATCH, STRIDE, HEAD = 16, 8, 64  # pixels a side and from one to the next, and channels of an attention head
GUIDANCE = 2.0
PREVIEWS = (
    "a red star above a blue square",
    "two green triangles",
    "a purple ring to the left of an orange cross",
    "four blue circles",
    "a large yellow square",
    "three red crosses, softly shaded, lit from the left",
    "an orange circle below a green star",
    "a small purple triangle on a pink background",
)


def worlds(size: SizeName = "s") -> RunConfig:
    """Pre-training on Worlds, from scratch."""
    s = SIZES[size]
    return RunConfig(
        pipeline=PipelineConfig(
            text=ByteEncoderConfig(width=s.text, heads=s.text // HEAD),
            denoiser=DiTConfig(width=s.width, depth=s.depth, heads=s.width // HEAD, patch=PATCH, stride=STRIDE, text_width=s.text),
            sampling=Sampling(size=s.image, guidance=GUIDANCE, solver="consistency", steps=30, shift=2.0),
        ),
        data=WorldsConfig(size=s.image),
        method=DenoiseConfig(level=0.3, detail=1.0, times=TimeDensity(mean=1.2, uniform=0.1)),
        optim=OptimConfig(lr=s.lr, warmup=s.steps // 20),
        train=TrainConfig(
            steps=s.steps,
            batch=s.batch,
            log=max(1, s.steps // 120),
            evaluate=max(1, s.steps // 8),
            preview=max(1, s.steps // 5),
            preview_prompts=PREVIEWS,
        ),
    )


def starter(size: SizeName = "s") -> RunConfig:
    """The packaged model: pre-training gone on with (``--init runs/speedrun-s/pretrain``), on scenes of another seed.

    Two things without colours in the caption are what it learns last: half of the captions are such.
    """
    config = worlds(size)
    config.data = WorldsConfig(size=config.data.size, seed=4, coloured=0.5)
    config.train = config.train.replace(steps=config.train.steps * 4 // 3, export="float16")
    config.optim = config.optim.replace(lr=3e-3)
    return config


def images(size: SizeName = "s") -> RunConfig:
    """Pre-training on a folder of captioned images (``--data DIR``): smaller patches, since found pictures have more to draw."""
    config = worlds(size)
    config.pipeline.denoiser = config.pipeline.denoiser.replace(patch=PATCH // 2, stride=STRIDE // 2)
    config.data = FolderConfig(path="", size=config.data.size)
    config.train = config.train.replace(batch=config.train.batch // 2, preview_prompts=())
    return config
