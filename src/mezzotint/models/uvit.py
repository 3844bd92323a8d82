"""U-ViT (Bao et al. 2023): a plain vision transformer to which everything is a token, with long skips from its first half to its last.

Time, class, text and patches stand in one sequence, with learned positions. What leaves the i-th block is joined to what enters the
i-th from the end, by a linear layer over both. There is no modulation.

Where we differ: text has a mask, and may be shorter than the table of its positions. Pictures of another size than the network was
trained at have its positions resampled. Every network with classes has a row for none. The time is t = i / 1000 with i the index
that the published networks know, as in `unet.py`.

B batch, C channels, N image tokens, L text tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import PlainAttention, with_image
from mezzotint.models.blocks import MLP
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import as_picture, patchify, resample, sinusoid, unpatchify


@dataclass
class UViTConfig(DenoiserConfig, kind="uvit"):
    """Sizes of a U-ViT; as they stand here, those of H/2 for ImageNet at 256 px.

    depth: blocks beside the one in the middle. side: of the table of positions, in patches. smooth: whether a 3 x 3 convolution
    comes last. classes: labels from 0 to one less, 0 where the network knows none. text_width: of the text features, 0 where it
    reads none; text_length: most tokens of a text. The published networks predict the noise of a variance-preserving path.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    patch: int = 2
    channels: int = 4
    side: int = 16
    smooth: bool = False
    classes: int = 1000
    text_width: int = 0
    text_length: int = 77
    prediction: Prediction = "noise"

    def build(self) -> "UViT":
        return UViT(self)


class UViTBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = PlainAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm_attention(x), mask=mask)
        x = x + self.mlp(self.norm_mlp(x))
        return x


class UViT(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with label and text where the configuration says so -> noise of the same shape.

    H and W are multiples of the patch. ValueError where the label is missing, or the text is longer than the table. At
    initialisation the output is not zero: the paper starts all layers with a deviation of 0.02.
    """

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size = config.width, config.patch**2 * config.channels
        if config.depth % 2:
            raise ValueError(f"depth must be even, half the blocks before the middle one and half after it, got {config.depth}")
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_label = nn.Embedding(config.classes + 1, width) if config.classes else None  # the last row is no class
        self.embed_text = nn.Linear(config.text_width, width) if config.text_width else None
        told = 1 + (1 if config.classes else 0) + (config.text_length if config.text_width else 0)
        self.positions_told = nn.Parameter(torch.empty(told, width))
        self.positions_patch = nn.Parameter(torch.empty(config.side**2, width))
        self.down = nn.ModuleList(UViTBlock(width, config.heads) for _ in range(config.depth // 2))
        self.middle = UViTBlock(width, config.heads)
        self.joins = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(config.depth // 2))
        self.up = nn.ModuleList(UViTBlock(width, config.heads) for _ in range(config.depth // 2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_size)
        self.smooth = nn.Conv2d(config.channels, config.channels, 3, padding=1) if config.smooth else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for weight in (self.positions_told, self.positions_patch, *(layer.weight for layer in linear)):
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in linear:
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation."""
        return [*self.down, self.middle, *self.up]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        picture = as_picture(x, p)
        rows, columns = picture.shape[-2] // p, picture.shape[-1] // p

        told, mask = self._told(t, cond)
        image = self.embed_patch(patchify(picture, p)) + resample(self.positions_patch, rows, columns)
        tokens, mask = torch.cat([told, image], dim=1), with_image(mask, image)

        skips = []
        for block in self.down:
            tokens = block(tokens, mask)
            skips.append(tokens)
        tokens = self.middle(tokens, mask)
        for join, block in zip(self.joins, self.up, strict=True):
            tokens = block(join(torch.cat([tokens, skips.pop()], dim=-1)), mask)

        patches = self.head(self.norm(tokens[:, told.shape[1] :]))
        return self.smooth(unpatchify(patches, p, picture.shape)[:, :, 0]).reshape(x.shape)

    def _told(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """Label, time and text as tokens with positions, as far as the network knows them, and the mask over them."""
        time = sinusoid(1000 * t, self.config.width).to(self.positions_told.dtype)[:, None]
        if self.embed_label is not None:
            if cond.label is None:
                raise ValueError(f"label must be given to this network: (B,) numbers of classes below {self.config.classes}, -1 for none")
            label = self.embed_label(cond.label.where(cond.label >= 0, self.config.classes))
            time = torch.cat([label[:, None], time], dim=1)
        if self.embed_text is None:
            return time + self.positions_told, None
        if cond.text.shape[1] > self.config.text_length:
            raise ValueError(f"text must have at most {self.config.text_length} tokens, got {cond.text.shape[1]}")
        told = torch.cat([time, self.embed_text(cond.text)], dim=1)
        mask = None if cond.mask is None else F.pad(cond.mask, (time.shape[1], 0), value=True)
        return told + self.positions_told[: told.shape[1]], mask


def uvit_h_2() -> UViTConfig:
    """U-ViT-H/2 for ImageNet at 256 px, in latents: 501M parameters."""
    return UViTConfig()


def uvit_l_2() -> UViTConfig:
    """U-ViT-L/2 for ImageNet at 256 px, in latents: 287M parameters."""
    return uvit_h_2().replace(width=1024, depth=20, smooth=True)


def uvit_m_4() -> UViTConfig:
    """U-ViT-M/4 for ImageNet at 64 px, in pixels: 131M parameters."""
    return uvit_l_2().replace(width=768, depth=16, heads=12, patch=4, channels=3)


def uvit_s_2() -> UViTConfig:
    """U-ViT-S/2 for CIFAR-10, in pixels, without conditions: 44M parameters."""
    return uvit_l_2().replace(width=512, depth=12, heads=8, channels=3, classes=0)


def uvit_s_2_text() -> UViTConfig:
    """U-ViT-S/2 for MS-COCO at 256 px, in latents, with CLIP's text: 45M parameters."""
    return uvit_s_2().replace(channels=4, text_width=768)


def uvit_s_2_deep() -> UViTConfig:
    """U-ViT-S/2 (Deep) for MS-COCO: 58M parameters."""
    return uvit_s_2_text().replace(depth=16)


PRESETS: dict[str, Callable[[], UViTConfig]] = {
    "uvit-h-2": uvit_h_2,
    "uvit-l-2": uvit_l_2,
    "uvit-m-4": uvit_m_4,
    "uvit-s-2": uvit_s_2,
    "uvit-s-2-text": uvit_s_2_text,
    "uvit-s-2-deep": uvit_s_2_deep,
}
