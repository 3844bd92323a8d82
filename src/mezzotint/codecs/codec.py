"""What all codecs share: sizes, the normalisation of latents and the range of pictures.

B batch, C channels of the latents, H and W rows and columns of a picture in pixels, f pixels a side for one of the latents'.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mezzotint import config


class Codec(nn.Module, ABC):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H / f, W / f) and back. H and W are multiples of f, or it is a ValueError.

    Latents leave it as (z - shift) * scale, about as wide as a standard normal, and come back so. z are the latents that the
    codec itself knows: `compress` makes them and `restore` reads them. Decoding clamps; who needs gradients beyond the range of
    pictures asks `restore`. factor: f. scale: a positive number.
    """

    def __init__(self, channels: int, factor: int, scale: float, shift: float = 0.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.channels = channels
        self.factor = factor
        self.scale = scale
        self.shift = shift

    @property
    def pixels(self) -> "Codec":
        """The codec that takes pictures: this one, unless what it takes was made of them beforehand."""
        return self

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of (height, width)."""
        height, width = size
        if height % self.factor or width % self.factor:
            raise ValueError(f"height and width must be multiples of the factor {self.factor}, got {height}x{width}")
        return self.channels, height // self.factor, width // self.factor

    def normalise(self, z: Tensor) -> Tensor:
        """z as latents leave the codec."""
        return (z - self.shift) * self.scale

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H / f, W / f), normalised."""
        return self.normalise(self.compress(self._in_precision(images)).to(images.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H / f, W / f), normalised -> (B, 3, H, W), clamped to [-1, 1]."""
        return self.restore(self._in_precision(latents / self.scale + self.shift)).to(latents.dtype).clamp(-1, 1)

    def _in_precision(self, x: Tensor) -> Tensor:
        """In the precision of the weights, where there are any."""
        return x.to(next(self.parameters(), x).dtype)

    @abstractmethod
    def compress(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> z (B, C, H / f, W / f)."""

    @abstractmethod
    def restore(self, z: Tensor) -> Tensor:
        """z (B, C, H / f, W / f) -> (B, 3, H, W), not clamped."""


class CodecConfig(config.Config, ABC, kind="codec"):
    """Base of the codecs' configurations."""

    @abstractmethod
    def build(self) -> Codec:
        """The codec."""
