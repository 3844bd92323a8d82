"""The codec of pixel models: latents are pixels."""

from dataclasses import dataclass

from torch import Tensor

from mezzotint.codecs.codec import Codec, CodecConfig


@dataclass
class IdentityConfig(CodecConfig, kind="identity"):
    """Nothing to set."""

    def build(self) -> "Identity":
        return Identity()


class Identity(Codec):
    """Encodes and decodes (B, C, H, W) in [-1, 1] to itself. Decoding clamps: a picture has no values beyond."""

    factor = 1

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return 3, *size

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)
