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
    """Pictures are their own latents, of three channels."""

    def __init__(self) -> None:
        super().__init__(channels=3, factor=1, scale=1.0)

    def compress(self, images: Tensor) -> Tensor:
        return images

    def restore(self, z: Tensor) -> Tensor:
        return z
