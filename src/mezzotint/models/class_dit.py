"""DiT as published (Peebles & Xie 2023): classes instead of texts, in the latents of a KL autoencoder.

This is a file of its own beside `dit.py`: that one reads text in every attention, normalises queries and keys, rotates positions,
overlaps patches and uses the exact GELU; to be both, every line of it would ask which one it is.

Where we differ: a learned variance is read from published weights, and is not part of the output.

B batch, C channels, N image tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezzotint import config
from mezzotint.flow.path import Prediction
from mezzotint.models.attention import SelfAttention
from mezzotint.models.blocks import MLP, Head, Modulation, gated, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.embed import TimeEmbedding, as_picture, image_positions, patchify, sincos_2d_mae, unpatchify


@dataclass
class ClassDiTConfig(config.Config, kind="class_dit"):
    """Sizes of a DiT; as they stand here, those of XL/2 at 256 px.

    classes: labels from 0 to one less. span: positions run from 0 to this along both sides, whatever the size of the picture.
    variance: whether the head has channels for a learned variance, as published. The published networks predict the noise of a
    variance-preserving path.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    patch: int = 2
    channels: int = 4
    classes: int = 1000
    span: float = 16.0
    variance: bool = True
    prediction: Prediction = "noise"

    def build(self) -> "ClassDiT":
        return ClassDiT(self)


class ClassDiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition c (B, D): adaLN-zero."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads)
        self.mlp = MLP(dim, approximate="tanh")

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = gated(x, gate_a, self.attention(modulate(self.norm(x), shift_a, scale_a)))
        x = gated(x, gate_m, self.mlp(modulate(self.norm(x), shift_m, scale_m)))
        return x


class ClassDiT(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with label -> noise of the same shape.

    H and W are multiples of the patch. At initialisation the output is zero and blocks are identities.
    """

    def __init__(self, config: ClassDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size = config.width, config.patch**2 * config.channels
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_label = nn.Embedding(config.classes + 1, width)  # the last row is no class
        self.blocks = nn.ModuleList(ClassDiTBlock(width, config.heads) for _ in range(config.depth))
        self.head = Head(width, (2 if config.variance else 1) * patch_size)
        initialise(self, self.head.linear)
        for weight in (self.embed_label.weight, *(p for p in self.embed_time.parameters() if p.ndim == 2)):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p, span = self.config.patch, self.config.span
        picture = as_picture(x, p)
        rows, columns = picture.shape[-2] // p, picture.shape[-1] // p

        positions = image_positions(1, rows, columns, x.device) * x.new_tensor([1, span / rows, span / columns], dtype=torch.float32)
        image = self.embed_patch(patchify(picture, p))
        image = image + sincos_2d_mae(positions, self.config.width).to(self.embed_patch.weight.dtype)
        c = self.embed_time(t) + self.embed_label(self._label(cond))

        for block in self.blocks:
            image = block(image, c)

        channels, patches = picture.shape[1], self.head(image, c)
        shape = torch.Size((len(x), patches.shape[2] // p**2, *picture.shape[2:]))
        return unpatchify(patches, p, shape)[:, :channels].reshape(x.shape)

    def _label(self, cond: Cond) -> Tensor:
        if cond.label is None:
            raise ValueError(f"label must be given to this network: (B,) numbers of classes below {self.config.classes}, -1 for none")
        return cond.label.where(cond.label >= 0, self.config.classes)


def dit_xl_2() -> ClassDiTConfig:
    """DiT-XL/2 at 256 px, 675M parameters."""
    return ClassDiTConfig()


def dit_xl_2_512() -> ClassDiTConfig:
    """DiT-XL/2 at 512 px."""
    return dit_xl_2().replace(span=32.0)


def dit_l_2() -> ClassDiTConfig:
    """DiT-L/2, 458M parameters."""
    return dit_xl_2().replace(width=1024, depth=24)


def dit_b_2() -> ClassDiTConfig:
    """DiT-B/2, 130M parameters."""
    return dit_xl_2().replace(width=768, depth=12, heads=12)


def dit_s_2() -> ClassDiTConfig:
    """DiT-S/2, 33M parameters."""
    return dit_b_2().replace(width=384, heads=6)


PRESETS: dict[str, Callable[[], ClassDiTConfig]] = {
    "dit-xl-2": dit_xl_2,
    "dit-xl-2-512": dit_xl_2_512,
    "dit-l-2": dit_l_2,
    "dit-b-2": dit_b_2,
    "dit-s-2": dit_s_2,
}
