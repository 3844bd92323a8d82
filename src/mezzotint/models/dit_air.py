"""DiT-Air (Chen et al. 2025): one plain DiT over text and image tokens together, with one modulation for all blocks.

What MMDiT has twice, once for each modality, is here once; and blocks may share more than the modulation, down to a single block
that is applied over and over (as ALBERT does).

Where we differ: the paper leaves positions open; here they are rotations with axes frame, row and column, and text tokens stand at
the origin and carry their order in their features. Queries and keys are normalised per head.

B batch, C channels, F frames, N image tokens, L text tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import SelfAttention, with_image
from mezzotint.models.blocks import MLP, Head, Modulation, gated, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import TimeEmbedding, VectorEmbedding, as_video, image_positions, patchify, rope, rope_axes, unpatchify

Part = Literal["modulation", "attention", "mlp"]
PARTS: tuple[Part, ...] = ("modulation", "attention", "mlp")


@dataclass
class DiTAirConfig(DenoiserConfig, kind="dit_air"):
    """Sizes of a DiT-Air.

    shared: the parts that all blocks have in common, of "modulation" (6 D^2 parameters), "attention" (4 D^2) and "mlp" (8 D^2).
    The modulation alone makes a DiT-Air; with the attention, a DiT-Air-Lite. text_width: of the text features; pooled_width: of
    the pooled text.
    """

    width: int = 1536
    depth: int = 24
    heads: int = 24
    shared: tuple[Part, ...] = ("modulation",)
    patch: int = 2
    channels: int = 16
    text_width: int = 4096
    pooled_width: int = 2048
    prediction: Prediction = "velocity"

    def build(self) -> "DiTAir":
        return DiTAir(self)


def _parts(config: DiTAirConfig, shared: bool) -> nn.ModuleDict:
    """The parts of a block that all have in common, or those that are its own."""
    make: dict[str, Callable[[], nn.Module]] = {
        "modulation": lambda: Modulation(config.width, 6),
        "attention": lambda: SelfAttention(config.width, config.heads, norm="head"),
        "mlp": lambda: MLP(config.width),
    }
    return nn.ModuleDict({name: make[name]() for name in PARTS if (name in config.shared) == shared})


class DiTAirBlock(nn.Module):
    """A DiT block; what it has in common with the others is handed to it."""

    def __init__(self, config: DiTAirConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.own = _parts(config, shared=False)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor, mask: Tensor | None, shared: nn.ModuleDict) -> Tensor:
        modulation, attention, mlp = ((shared if name in shared else self.own)[name] for name in PARTS)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(c)
        x = gated(x, gate_a, attention(modulate(self.norm(x), shift_a, scale_a), rotation, mask))
        x = gated(x, gate_m, mlp(modulate(self.norm(x), shift_m, scale_m)))
        return x


class DiTAir(nn.Module):
    """(B, C, H, W) or (B, C, F, H, W), t (B,), Cond with text and pooled -> prediction of the same shape.

    H and W are multiples of the patch. At initialisation the output is zero and blocks are identities.
    """

    def __init__(self, config: DiTAirConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        if unknown := set(config.shared) - set(PARTS):
            raise ValueError(f"shared must name parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        width, patch_size = config.width, config.patch**2 * config.channels
        self.axes = rope_axes(width // config.heads)
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_text = nn.Linear(config.text_width, width)
        self.embed_pooled = VectorEmbedding(config.pooled_width, width)
        self.embed_time = TimeEmbedding(width)
        self.shared = _parts(config, shared=True)
        self.blocks = nn.ModuleList(DiTAirBlock(config) for _ in range(config.depth))
        self.head = Head(width, patch_size)
        initialise(self, self.head.linear)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        video = as_video(x, p)
        _, _, frames, height, width = video.shape

        image = self.embed_patch(patchify(video, p))
        text = self.embed_text(cond.text)
        positions = image_positions(frames, height // p, width // p, x.device)
        rotation = rope(torch.cat([positions.new_zeros(text.shape[1], 3), positions]), self.axes)
        mask = with_image(cond.mask, image)
        c = self.embed_time(t) + self.embed_pooled(cond.pooled)

        tokens = torch.cat([text, image], dim=1)
        for block in self.blocks:
            tokens = block(tokens, c, rotation, mask, self.shared)

        return unpatchify(self.head(tokens[:, text.shape[1] :], c), p, video.shape).reshape(x.shape)
