"""What every codec is, for those who do not know which one they have."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mezzotint import config


class Codec(nn.Module, ABC):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H / factor, W / factor), normalised, and back."""

    factor: int

    @abstractmethod
    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of (height, width). ValueError for a size that it cannot encode."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """The latents of pictures."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The pictures of latents, within [-1, 1]."""


class CodecConfig(config.Config, ABC, kind="codec"):
    """Base of the codecs' configurations."""

    @abstractmethod
    def build(self) -> Codec:
        """The codec."""
