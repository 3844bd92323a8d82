"""What every denoiser's configuration must say, for those who do not know which architecture they have."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, cast

from torch import Tensor, nn

from mezzotint import config
from mezzotint.flow.path import Prediction
from mezzotint.models.blocks import zero
from mezzotint.models.cond import Cond
from mezzotint.models.embed import patch_grid


class DenoiserConfig(config.Config, ABC, kind="denoiser"):
    """Base of the networks' configurations: dataclasses whose fields have these names. The network is `forward(x, t, cond)`.

    guidance, jump: whether the network is told `Cond.guidance` and `Cond.jump` (see `tell`); architectures that can be told have a
    field of that name.
    """

    guidance: bool = False
    jump: bool = False

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
    def maskable(self) -> bool:
        """Whether the network can leave patches out: those that `Cond.keep` does not name."""
        return False

    @property
    def distilled(self) -> bool:
        """Whether the network is told a guidance scale, `Cond.guidance`, and imitates guidance by it in one call."""
        return self.guidance

    @abstractmethod
    def build(self) -> nn.Module:
        """The network."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches. ValueError for a size that the model cannot draw."""
        return patch_grid(height, self.patch, self.patch), patch_grid(width, self.patch, self.patch)


Told = Literal["guidance", "jump"]


def tell(denoiser: nn.Module, what: Told) -> None:
    """Give a network an input for one more number beside the time, which changes nothing at first: students need it.

    The number is embedded as the time is, by a copy of that embedding whose last layer starts at zero, and added to it (Meng et al.
    2023, section 3.1, for the guidance; Geng et al. 2025, section 4.3, for the jump). ValueError for an architecture without a place
    for it, and for a network that has been told already.
    """
    name = f"embed_{what}"
    if not hasattr(denoiser, name):
        raise ValueError(f"{type(denoiser).__name__} has no input for {what}; take one of DiT, MMDiT, Flux and UNet")
    if getattr(denoiser, name) is not None:
        raise ValueError(f"this network is told {what} already; start from one that is not")
    embedding: Any = copy.deepcopy(denoiser.embed_time).requires_grad_(True)
    zero(embedding.mlp[-1])
    setattr(denoiser, name, embedding)
    denoiser.config = denoiser.config.replace(**{what: True})  # type: ignore[union-attr, operator]


def told(denoiser: nn.Module, cond: Cond) -> Tensor | float:
    """What a network is told beside the time, (B, D), for its forward pass to add to the time's embedding; 0 where that is nothing.

    ValueError where `cond` does not say it.
    """
    total: Tensor | float = 0.0
    for name, embedding in (("guidance", denoiser.embed_guidance), ("jump", denoiser.embed_jump)):
        if embedding is None:
            continue
        value = getattr(cond, name)
        if value is None:
            raise ValueError(f"{name} must be given to a network that is told it, one number for every sample")
        total = total + embedding(value)  # type: ignore[operator]
    return total


def check_mixer(mixer: int, depth: int) -> None:
    """ValueError where no block would be left for the patches that are kept."""
    if not 0 <= mixer < depth:
        raise ValueError(f"mixer must be within [0, {depth - 1}], blocks before one that leaves patches out, got {mixer}")


def blocks(net: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network in their order: what it declares as its `blocks`; else what is in its outermost module lists."""
    if hasattr(net, "blocks"):
        return list(cast(Iterable[nn.Module], net.blocks))
    if isinstance(net, nn.ModuleList):
        return list(net)
    return [block for child in net.children() for block in blocks(child)]
