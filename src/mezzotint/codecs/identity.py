"""The codec of pixel models: latents are pixels."""

from dataclasses import dataclass

from torch import Tensor, nn

from mezzotint import config


@dataclass
class IdentityConfig(config.Config, kind="identity"):
    """Nothing to set."""

    def build(self) -> "Identity":
        return Identity()


class Identity(nn.Module):
    """Encodes and decodes (B, C, H, W) in [-1, 1] to itself. Decoding clamps: a picture has no values beyond."""

    factor = 1

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of (height, width)."""
        return 3, *size

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)
