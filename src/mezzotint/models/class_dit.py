"""DiT as published (Peebles & Xie 2023): classes instead of texts, in the latents of a KL autoencoder.

Time and class reach the blocks in one of three ways (figure 3): they shift, scale and gate (adaLN-zero, the best and the one whose
weights are published), they are attended to as two tokens of their own, or they stand among the image's tokens.

This is a file of its own beside `dit.py`: that one reads text in every attention, normalises queries and keys, rotates positions,
overlaps patches and uses the exact GELU; to be both, every line of it would ask which one it is. Patches are left out as there.

Where we differ: a learned variance is read from published weights, and is not part of the output.

B batch, C channels, N image tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import CrossAttention, SelfAttention
from mezzotint.models.blocks import MLP, Head, Modulation, gated, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig, check_mixer
from mezzotint.models.embed import TimeEmbedding, as_picture, chosen, patchify, put_back, sincos_2d_mae, spanning_positions, unpatchify

Variant = Literal["adaln_zero", "cross_attention", "in_context"]


@dataclass
class ClassDiTConfig(DenoiserConfig, kind="class_dit"):
    """Sizes of a DiT; as they stand here, those of XL/2 at 256 px.

    variant: how time and class reach the blocks. classes: labels from 0 to one less. span: positions run from 0 to this along both
    sides, whatever the size of the picture. mixer: see `DiTConfig`. variance: whether the head has channels for a learned variance,
    as published. The published networks predict the noise of a variance-preserving path.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    variant: Variant = "adaln_zero"
    patch: int = 2
    channels: int = 4
    classes: int = 1000
    span: float = 16.0
    variance: bool = True
    prediction: Prediction = "noise"
    mixer: int = 0

    @property
    def maskable(self) -> bool:
        return True

    def build(self) -> "ClassDiT":
        return ClassDiT(self)


class AdaLNZeroBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by time and class, said (B, 2, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads)
        self.mlp = MLP(dim, approximate="tanh")

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(said.sum(1))
        x = gated(x, gate_a, self.attention(modulate(self.norm(x), shift_a, scale_a)))
        x = gated(x, gate_m, self.mlp(modulate(self.norm(x), shift_m, scale_m)))
        return x


class InContextBlock(nn.Module):
    """A plain transformer block: time and class are among its tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attention = SelfAttention(dim, heads)
        self.mlp = MLP(dim, approximate="tanh")

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class CrossAttentionBlock(InContextBlock):
    """A block with attention to time and class, said (B, 2, D), after that of the image to itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
        self.cross = CrossAttention(dim, heads)

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        x = x + self.cross(self.norm_cross(x), said)
        return x + self.mlp(self.norm_mlp(x))


class PlainHead(nn.Module):
    """The last layer without modulation."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        patches: Tensor = self.linear(self.norm(x))
        return patches


BLOCKS: dict[Variant, type[nn.Module]] = {
    "adaln_zero": AdaLNZeroBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}


class ClassDiT(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with label -> noise of the same shape.

    H and W are multiples of the patch. At initialisation the output is zero, and blocks with adaLN-zero are identities.
    """

    def __init__(self, config: ClassDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        check_mixer(config.mixer, config.depth)
        if config.variant not in BLOCKS:
            raise ValueError(f"variant must be one of {', '.join(BLOCKS)}, got {config.variant}")
        width, patch_size = config.width, config.patch**2 * config.channels
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_label = nn.Embedding(config.classes + 1, width)  # the last row is no class
        self.blocks = nn.ModuleList(BLOCKS[config.variant](width, config.heads) for _ in range(config.depth))
        head = Head if config.variant == "adaln_zero" else PlainHead
        self.head = head(width, (2 if config.variance else 1) * patch_size)
        initialise(self, self.head.linear)
        for weight in (self.embed_label.weight, *(p for p in self.embed_time.parameters() if p.ndim == 2)):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        picture = as_picture(x, p)
        rows, columns = picture.shape[-2] // p, picture.shape[-1] // p

        positions = sincos_2d_mae(spanning_positions(rows, columns, self.config.span, x.device), self.config.width)
        image = self.embed_patch(patchify(picture, p)) + positions.to(self.embed_patch.weight.dtype)
        said = torch.stack([self.embed_time(t), self.embed_label(self._label(cond))], dim=1)

        tokens = torch.cat([said, image], dim=1) if self.config.variant == "in_context" else image
        others = tokens.shape[1] - rows * columns
        for number, block in enumerate(self.blocks):
            if cond.keep is not None and number == self.config.mixer:
                tokens = torch.cat([tokens[:, :others], chosen(tokens[:, others:], cond.keep)], dim=1)
            tokens = block(tokens, said)

        patches = self.head(tokens[:, others:], said.sum(1))
        patches = patches if cond.keep is None else put_back(patches, cond.keep, rows * columns)
        noise = patches.unflatten(-1, (p * p, -1))[..., : picture.shape[1]].flatten(2)  # without the variance
        return unpatchify(noise, p, picture.shape).reshape(x.shape)

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
