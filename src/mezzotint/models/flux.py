"""FLUX.1 (Black Forest Labs 2024; published as code): joint blocks as in SD3, then parallel blocks on one stream.

Time, guidance and the pooled CLIP text modulate; the text is T5's. A network that was distilled with guidance is told the scale
it should imitate. Control and Fill read further latents beside x, place by place.

Where we differ: text has a mask. The published code has none, and attends to padding: that is a mask of None. The channels of a
patch stand last, as everywhere here.

B batch, C channels, F frames, N image tokens, L text tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import QKV, attend, with_image
from mezzotint.models.blocks import MLP, Head, JointBlock, Modulation, Stream, gated, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig, told
from mezzotint.models.embed import TimeEmbedding, VectorEmbedding, as_video, image_positions, patchify, rope, rotate, unpatchify


@dataclass
class FluxConfig(DenoiserConfig, kind="flux"):
    """Sizes of a FLUX.1; as they stand here, those of dev.

    joint, single: numbers of blocks with two streams and with one. axes: channels of a head that turn with frame, row and column.
    control: channels of `Cond.control`. guidance, jump: whether it is told these numbers. text_width: of the text features;
    pooled_width: of the pooled text.
    """

    width: int = 3072
    joint: int = 19
    single: int = 38
    heads: int = 24
    axes: tuple[int, int, int] = (16, 56, 56)
    patch: int = 2
    channels: int = 16
    control: int = 0
    guidance: bool = True
    jump: bool = False
    text_width: int = 4096
    pooled_width: int = 768
    prediction: Prediction = "velocity"

    def build(self) -> "Flux":
        return Flux(self)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on text and image as one stream (parallel layers as in Dehghani et al. 2023)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.widths = [3 * dim, 4 * dim]
        self.modulation = Modulation(dim, 3)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.inner = nn.Linear(dim, sum(self.widths))
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.outer = nn.Linear(5 * dim, dim)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(c)
        qkv, hidden = self.inner(modulate(self.norm(x), shift, scale)).split(self.widths, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L + N, d)
        attended = attend(rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation), v, mask)
        return gated(x, gate, self.outer(torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1)))


class Flux(nn.Module):
    """(B, C, H, W) or (B, C, F, H, W), t (B,), Cond with text and pooled -> velocity of the same shape.

    H and W are multiples of the patch. Where the configuration says so, Cond has guidance and control, or it is a ValueError. At
    initialisation the output is zero and blocks are identities.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, heads = config.width, config.heads
        if sum(config.axes) * heads != width:
            raise ValueError(f"axes must add up to the channels of a head, {width} / {heads}, got {config.axes}")
        self.embed_patch = nn.Linear(config.patch**2 * (config.channels + config.control), width)
        self.embed_text = nn.Linear(config.text_width, width)
        self.embed_pooled = VectorEmbedding(config.pooled_width, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_guidance = TimeEmbedding(width) if config.guidance else None
        self.embed_jump = TimeEmbedding(width) if config.jump else None
        self.joint = nn.ModuleList(JointBlock(self._stream(), self._stream()) for _ in range(config.joint))
        self.single = nn.ModuleList(SingleBlock(width, heads) for _ in range(config.single))
        self.head = Head(width, config.patch**2 * config.channels)
        initialise(self, self.head.linear)

    def _stream(self) -> Stream:
        width = self.config.width
        return Stream(width, QKV(width, self.config.heads, norm="head"), MLP(width, approximate="tanh"))

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the computation."""
        return [*self.joint, *self.single]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        video = as_video(x, p)
        _, _, frames, height, width = video.shape

        image = self.embed_patch(patchify(self._with_control(video, cond.control), p))
        text = self.embed_text(cond.text)
        positions = image_positions(frames, height // p, width // p, x.device)
        rotation = rope(torch.cat([positions.new_zeros(text.shape[1], 3), positions]), self.config.axes)
        mask = with_image(cond.mask, image)
        c = self.embed_time(t) + self.embed_pooled(cond.pooled) + told(self, cond)

        for block in self.joint:
            image, text = block(image, text, c, rotation, mask)
        tokens = torch.cat([text, image], dim=1)
        for block in self.single:
            tokens = block(tokens, c, rotation, mask)

        patches = self.head(tokens[:, text.shape[1] :], c)
        return unpatchify(patches, p, video.shape).reshape(x.shape)

    def _with_control(self, video: Tensor, control: Tensor | None) -> Tensor:
        """video (B, C, F, H, W) and control (B, C', H, W), on every frame -> (B, C + C', F, H, W)."""
        given = 0 if control is None else control.shape[1]
        if given != self.config.control:
            raise ValueError(f"control must have {self.config.control} channels, got {given}")
        if control is None:
            return video
        return torch.cat([video, control[:, :, None].expand(-1, -1, video.shape[2], -1, -1)], dim=1)


def flux_dev() -> FluxConfig:
    """FLUX.1 dev, 11.9B parameters."""
    return FluxConfig()


def flux_schnell() -> FluxConfig:
    """FLUX.1 schnell: four steps, without guidance."""
    return flux_dev().replace(guidance=False)


def flux_control() -> FluxConfig:
    """FLUX.1 Canny and Depth: the latents of a map are the control."""
    return flux_dev().replace(control=16)


def flux_fill() -> FluxConfig:
    """FLUX.1 Fill: the control is the latents of the picture without its hole, and the hole, an 8 x 8 mask per latent."""
    return flux_dev().replace(control=16 + 64)


PRESETS: dict[str, Callable[[], FluxConfig]] = {
    "flux-dev": flux_dev,
    "flux-schnell": flux_schnell,
    "flux-control": flux_control,
    "flux-fill": flux_fill,
}
