"""DiT (Peebles & Xie 2023) with text and image tokens in one attention.

Where we differ from the paper: image tokens attend to text tokens and to each other in every block, instead of a class
label; text tokens enter each block as they left the encoder, so they cost little and no block works on them; queries and
keys are normalised; positions are both added (fixed sin-cos) and rotated (RoPE with axes frame, row, column; text tokens
stand at the origin and carry their order in their features); patches may overlap, so that what lies on the border of one is seen and
drawn whole by another.

Patches may be left out in training (`Cond.keep`), as MicroDiT defers it (Sehwag et al. 2024, section 3.1): the first blocks, its
patch mixer, see all of them, so that those that stay know of those that go. Theirs is a narrower network of its own before this one.

B batch, C channels, N image tokens, L text tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import with_image
from mezzotint.models.blocks import AdaBlock, Modulation, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig, check_mixer, told
from mezzotint.models.embed import (
    TimeEmbedding,
    chosen,
    chosen_rotation,
    image_positions,
    patch_grid,
    patchify,
    put_back,
    rope,
    rope_axes,
    sincos_2d,
    unpatchify,
)


@dataclass
class DiTConfig(DenoiserConfig, kind="dit"):
    """Sizes of a DiT. patch: side of what a token sees and draws. stride: from one patch to the next, 0 for the patch itself;
    where a smaller one lets them overlap, what they draw adds up. text_width: of the text features. prediction: what the output means.
    mixer: how many of the blocks see all patches where some are left out; without effect where none is. guidance, jump: whether it is
    told these numbers.
    """

    width: int = 128
    depth: int = 6
    heads: int = 4
    patch: int = 8
    stride: int = 0
    channels: int = 3
    text_width: int = 128
    prediction: Prediction = "data"
    mixer: int = 0
    guidance: bool = False
    jump: bool = False

    def build(self) -> "DiT":
        return DiT(self)

    @property
    def maskable(self) -> bool:
        return self.stride in (0, self.patch)  # a patch that overlaps others is drawn by them, too

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches. ValueError for a size that the model cannot draw."""
        return patch_grid(height, self.patch, self.stride or self.patch), patch_grid(width, self.patch, self.stride or self.patch)


class DiT(nn.Module):
    """(B, C, H, W) or (B, C, F, H, W), t (B,), Cond -> prediction of the same shape. H and W are a patch and any number of strides.

    At initialisation the output is exactly zero and every block is the identity. Patches that are left out are zero.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        check_mixer(config.mixer, config.depth)
        width, patch_size = config.width, config.patch**2 * config.channels
        self.axes = rope_axes(width // config.heads)
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_text = nn.Linear(config.text_width, width)
        self.embed_pooled = nn.Linear(config.text_width, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_guidance = TimeEmbedding(width) if config.guidance else None
        self.embed_jump = TimeEmbedding(width) if config.jump else None
        self.blocks = nn.ModuleList(AdaBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, 2)
        self.head = nn.Linear(width, patch_size)
        initialise(self, self.head)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        video = x if x.ndim == 5 else x[:, :, None]
        _, _, frames, height, width = video.shape
        patch, stride = self.config.patch, self.config.stride or self.config.patch
        positions = image_positions(frames, *self.config.grid(height, width), x.device)
        fixed = sincos_2d(positions, self.config.width).to(self.embed_patch.weight.dtype)
        image = self.embed_patch(patchify(video, patch, stride)) + fixed
        text = self.norm(self.embed_text(cond.text))
        rotation = rope(torch.cat([positions.new_zeros(text.shape[1], 3), positions]), self.axes)
        mask = with_image(cond.mask, image)
        c = self.embed_time(t) + self.embed_pooled(cond.pooled) + told(self, cond)

        for number, block in enumerate(self.blocks):
            if cond.keep is not None and number == self.config.mixer:
                image, rotation = chosen(image, cond.keep), chosen_rotation(rotation, cond.keep, text.shape[1])
                mask = with_image(cond.mask, image)
            image = block(image, c, rotation, mask, text)

        image = self.head(modulate(self.norm(image), *self.modulation(c)))
        image = image if cond.keep is None else put_back(image, cond.keep, len(positions))
        return unpatchify(image, patch, video.shape, stride).reshape(x.shape)
