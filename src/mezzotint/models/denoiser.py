"""What every denoiser's configuration must say, for those who do not know which architecture they have."""

from abc import ABC, abstractmethod

from torch import nn

from mezzotint import config
from mezzotint.flow.path import Prediction
from mezzotint.models.embed import patch_grid


class DenoiserConfig(config.Config, ABC, kind="denoiser"):
    """Base of the networks' configurations: dataclasses whose fields have these names. The network is `forward(x, t, cond)`."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """Height and width are multiples of this."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of x, and of the prediction."""

    @property
    @abstractmethod
    def prediction(self) -> Prediction:
        """What the output means."""

    @property
    def distilled(self) -> bool:
        """Whether the network is told a guidance scale, `Cond.guidance`, and imitates guidance by it in one call."""
        return False

    @abstractmethod
    def build(self) -> nn.Module:
        """The network."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches. ValueError for a size that the model cannot draw."""
        return patch_grid(height, self.patch, self.patch), patch_grid(width, self.patch, self.patch)


def blocks(net: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network in their order: what is in its outermost lists; lists of single layers are none."""
    found: list[nn.Module] = []
    for child in net.children():
        found += [block for block in child if any(block.children())] if isinstance(child, nn.ModuleList) else blocks(child)
    return found
