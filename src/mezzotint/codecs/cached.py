"""Latents that were made beforehand: training takes them as they are, and only drawing needs the codec that made them."""

from dataclasses import dataclass, field

from torch import Tensor

from mezzotint.codecs.codec import Codec, CodecConfig
from mezzotint.codecs.identity import IdentityConfig


@dataclass
class CachedConfig(CodecConfig, kind="cached"):
    """codec: what made the latents."""

    codec: CodecConfig = field(default_factory=IdentityConfig)

    def build(self) -> "Cached":
        return Cached(self)


class Cached(Codec):
    """`encode` takes the codec's normalised latents (B, C, H / f, W / f) in the place of pictures and gives them back."""

    def __init__(self, config: CachedConfig) -> None:
        inner = config.codec.build()
        super().__init__(inner.channels, inner.factor, scale=1.0)
        self.inner = inner

    @property
    def pixels(self) -> Codec:
        return self.inner

    def compress(self, images: Tensor) -> Tensor:
        return images

    def restore(self, z: Tensor) -> Tensor:
        return self.inner.decode(z)
