"""Training of published networks at their published sizes, on latents and text features that were made beforehand.

For plans (``mezzotint plan flux-dev``): what is trained and on what is left to the user, and nothing here has been run.
"""

from typing import Any

from mezzotint.codecs import CodecConfig, IdentityConfig, deep, kl
from mezzotint.codecs.cached import CachedConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.models import PRESETS, DenoiserConfig, FuseDiTConfig, HiDreamConfig
from mezzotint.models.published import PUBLISHED
from mezzotint.pipeline import PipelineConfig, Sampling
from mezzotint.text.blank import BlankConfig
from mezzotint.train.optim import OptimConfig
from mezzotint.train.trainer import RunConfig, TrainConfig

# By factor and channels. The codec of Transfusion was not published.
CODECS: dict[tuple[int, int], CodecConfig] = {
    (1, 3): IdentityConfig(),
    (8, 4): kl.sdxl(),
    (8, 8): kl.sd15().replace(channels=8),
    (8, 16): kl.flux(),
    (32, 32): deep.sana(),
}


def published(name: str) -> RunConfig:
    """A run of a preset: flow matching by AdamW, one picture a micro-batch, all weights trained, an average kept."""
    made, denoiser = PUBLISHED[name], PRESETS[name]()
    return RunConfig(
        pipeline=PipelineConfig(
            text=_text(denoiser, made.text),
            denoiser=denoiser,
            codec=CachedConfig(CODECS[made.factor, denoiser.channels]),
            sampling=Sampling(size=made.pixels, steps=28, guidance=1.0 if denoiser.distilled else 4.5, batch=1),
        ),
        data=WorldsConfig(size=made.pixels),
        method=DenoiseConfig(),
        optim=OptimConfig(lr=1e-4, average=0.9999),
        train=TrainConfig(steps=100_000, batch=1, held_out=1),
    )


def _text(denoiser: DenoiserConfig, length: int) -> BlankConfig:
    fields: dict[str, Any] = vars(denoiser)
    text = BlankConfig(length, width=fields.get("text_width", 0), pooled=fields.get("pooled_width", 0))
    if isinstance(denoiser, HiDreamConfig):  # all layers of Llama 3.1 8B
        return text.replace(layers=32, states=denoiser.states_width)
    if isinstance(denoiser, FuseDiTConfig):  # keys and values of every layer
        return text.replace(layers=denoiser.depth, states=2 * denoiser.kv_heads * denoiser.head)
    return text
