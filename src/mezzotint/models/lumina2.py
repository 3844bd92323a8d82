"""Lumina-Image 2.0 (Qin et al. 2025): text and image are refined apart, then read as one stream.

Norms stand before and after attention and MLP (sandwich); time scales and gates, and shifts nothing; several query heads share one
key head; positions are rotations with three axes: text tokens stand one after the other on the first, and the image where the
text ends, with its row and column on the others.

Where we differ: the published network counts time from noise to data and predicts x0 - eps; here t = 0 is data and the output is
eps - x0, as everywhere. Texts of unlike lengths are masked instead of packed, to the same effect.

B batch, C channels, F frames, N image tokens, L text tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import SelfAttention, with_image
from mezzotint.models.blocks import Modulation, SwiGLU, initialise
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import TimeEmbedding, as_video, image_positions, patchify, rope, unpatchify


@dataclass
class Lumina2Config(DenoiserConfig, kind="lumina2"):
    """Sizes of a Lumina 2; as they stand here, those of Lumina-Image 2.0.

    refiners: blocks for text and for image alone. depth: joint blocks. kv_heads: key heads. axes: channels of a head that turn
    with the place in the text, the row and the column. hidden: of the MLP. time_width: of the embedded time. text_width: of the
    text features.
    """

    width: int = 2304
    refiners: int = 2
    depth: int = 26
    heads: int = 24
    kv_heads: int = 8
    axes: tuple[int, int, int] = (32, 32, 32)
    hidden: int = 9216
    patch: int = 2
    channels: int = 16
    time_width: int = 1024
    text_width: int = 2304
    prediction: Prediction = "velocity"

    def build(self) -> "Lumina2":
        return Lumina2(self)


class Sandwich(nn.Module):
    """The parts of a block with norms before and after its attention and its MLP."""

    def __init__(self, config: Lumina2Config) -> None:
        super().__init__()
        dim = config.width
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (nn.RMSNorm(dim, eps=1e-5) for _ in range(4))
        self.attention = SelfAttention(dim, config.heads, kv_heads=config.kv_heads, bias=False, norm="head", eps=1e-5)
        self.mlp = SwiGLU(dim, config.hidden)


class TextBlock(Sandwich):
    """A block without time, which refines the text."""

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.norm_2(self.attention(self.norm_1(x), rotation, mask))
        x = x + self.norm_4(self.mlp(self.norm_3(x)))
        return x


class TimedBlock(Sandwich):
    """A block scaled and gated by time c (B, time width)."""

    def __init__(self, config: Lumina2Config) -> None:
        super().__init__(config)
        self.modulation = Modulation(config.width, 4, condition=config.time_width)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, c: Tensor) -> Tensor:
        scale_a, gate_a, scale_m, gate_m = (part[:, None] for part in self.modulation(c))
        x = x + gate_a.tanh() * self.norm_2(self.attention(self.norm_1(x) * (1 + scale_a), rotation, mask))
        x = x + gate_m.tanh() * self.norm_4(self.mlp(self.norm_3(x) * (1 + scale_m)))
        return x


class Lumina2(nn.Module):
    """(B, C, H, W) or (B, C, F, H, W), t (B,), Cond with text -> velocity of the same shape.

    H and W are multiples of the patch. At initialisation the output is zero and blocks are identities, apart from those that
    refine the text.
    """

    def __init__(self, config: Lumina2Config) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size = config.width, config.patch**2 * config.channels
        if sum(config.axes) * config.heads != width:
            raise ValueError(f"axes must add up to the channels of a head, {width} / {config.heads}, got {config.axes}")
        self.embed_patch = nn.Linear(patch_size, width)
        self.norm_text = nn.RMSNorm(config.text_width, eps=1e-5)
        self.embed_text = nn.Linear(config.text_width, width)
        self.embed_time = TimeEmbedding(config.time_width, scale=1)
        self.text_refiner = nn.ModuleList(TextBlock(config) for _ in range(config.refiners))
        self.image_refiner = nn.ModuleList(TimedBlock(config) for _ in range(config.refiners))
        self.joint = nn.ModuleList(TimedBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale = Modulation(width, 1, condition=config.time_width)
        self.head = nn.Linear(width, patch_size)
        initialise(self, self.head)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation."""
        return [*self.text_refiner, *self.image_refiner, *self.joint]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        video = as_video(x, p)
        _, _, frames, height, width = video.shape

        text = self.embed_text(self.norm_text(cond.text))
        image = self.embed_patch(patchify(video, p))
        c = self.embed_time(1 - t)
        rotation = self._rotation(cond, image_positions(frames, height // p, width // p, x.device))
        mask, length = with_image(cond.mask, image), text.shape[1]

        for block in self.text_refiner:
            text = block(text, rotation[:, :, :length], cond.mask)
        for block in self.image_refiner:
            image = block(image, rotation[:, :, length:], None, c)
        tokens = torch.cat([text, image], dim=1)
        for block in self.joint:
            tokens = block(tokens, rotation, mask, c)

        (scale,) = self.scale(c)
        patches = self.head(self.norm(tokens[:, length:]) * (1 + scale[:, None]))
        return -unpatchify(patches, p, video.shape).reshape(x.shape)

    def _rotation(self, cond: Cond, image: Tensor) -> Tensor:
        """(B, 1, L + N, d / 2, 2): real text tokens are counted on the first axis, and image (N, 3) is moved to where they end."""
        mask = cond.masked().mask
        assert mask is not None
        place = mask.cumsum(1)
        text = torch.stack([place - 1, torch.zeros_like(place), torch.zeros_like(place)], dim=-1)
        end = torch.stack([mask.sum(1), *mask.new_zeros(2, len(mask))], dim=-1)
        return rope(torch.cat([text, image + end[:, None]], dim=1).float(), self.config.axes)[:, None]


def lumina_image_2() -> Lumina2Config:
    """Lumina-Image 2.0, 2.61B parameters."""
    return Lumina2Config()


PRESETS: dict[str, Callable[[], Lumina2Config]] = {"lumina-image-2": lumina_image_2}
