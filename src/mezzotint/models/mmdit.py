"""MMDiT (Esser et al. 2024), the network of Stable Diffusion 3 and 3.5.

Text and image are two streams with weights of their own that meet in one attention per block; time and the pooled text modulate
both. The text is what three encoders say: CLIP-L and CLIP-G side by side, padded with zeros to T5's width, then T5. An encoder
that is left out is zeros.

Where we differ: text has a mask. The published code has none, and attends to padding: that is a mask of None.

B batch, C channels, N image tokens, L text tokens, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import QKV, QKNorm, SelfAttention, with_image
from mezzotint.models.blocks import MLP, Head, JointBlock, Source, Stream, gated, initialise, modulate
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig, told
from mezzotint.models.embed import TimeEmbedding, VectorEmbedding, as_picture, image_positions, patchify, sincos_2d_mae, unpatchify


@dataclass
class MMDiTConfig(DenoiserConfig, kind="mmdit"):
    """Sizes of an MMDiT; as they stand here, SD3 medium's.

    table: side in patches of the largest picture; all pictures share its centre. base: positions in the table run from 0 to
    this. qk_norm: queries and keys normalised per head. dual: how many of the first blocks have a second attention over the
    image alone (MMDiT-X). text_width: of the text features; pooled_width: of the pooled text. guidance, jump: whether it is told these
    numbers.
    """

    width: int = 1536
    depth: int = 24
    heads: int = 24
    patch: int = 2
    channels: int = 16
    text_width: int = 4096
    pooled_width: int = 2048
    table: int = 192
    base: int = 64
    qk_norm: bool = False
    dual: int = 0
    prediction: Prediction = "velocity"
    guidance: bool = False
    jump: bool = False

    def build(self) -> "MMDiT":
        return MMDiT(self)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super().grid(height, width)
        if max(rows, columns) > self.table:
            raise ValueError(f"height and width must be at most {self.table} patches of {self.patch}, got {rows}x{columns}")
        return rows, columns


class DualStream(Stream):
    """The image's half of an MMDiT-X block: beside the joint attention, one over the image alone with a modulation of its own."""

    def __init__(self, dim: int, heads: int, qk_norm: QKNorm | None) -> None:
        super().__init__(dim, QKV(dim, heads, norm=qk_norm), MLP(dim, approximate="tanh"), chunks=9)
        self.alone = SelfAttention(dim, heads, norm=qk_norm)

    def ask(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        shift_a, scale_a, *rest, shift_s, scale_s, gate_s = self.modulation(c)
        x = self.norm(x)
        alone = self.alone(modulate(x, shift_s, scale_s))
        return self.qkv(modulate(x, shift_a, scale_a)), (*rest, gate_s, alone)

    def answer(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        *rest_a, gate_s, alone = rest
        return super().answer(gated(x, gate_s, alone), attended, tuple(rest_a))


class MMDiT(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with text and pooled -> prediction of the same shape.

    H and W are multiples of the patch, at most `table` patches. At initialisation the output is zero and blocks are identities.
    """

    positions: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size = config.width, config.patch**2 * config.channels
        grid = image_positions(1, config.table, config.table) * (config.base / config.table)
        self.register_buffer("positions", sincos_2d_mae(grid, width)[None])
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_text = nn.Linear(config.text_width, width)
        self.embed_pooled = VectorEmbedding(config.pooled_width, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_guidance = TimeEmbedding(width) if config.guidance else None
        self.embed_jump = TimeEmbedding(width) if config.jump else None
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.depth))
        self.head = Head(width, patch_size)
        initialise(self, self.head.linear)

    def _block(self, number: int) -> JointBlock:
        width, heads = self.config.width, self.config.heads
        norm: QKNorm | None = "head" if self.config.qk_norm else None
        image, text = (Stream(width, QKV(width, heads, norm=norm), MLP(width, approximate="tanh")) for _ in range(2))
        if number < self.config.dual:
            image = DualStream(width, heads, norm)
        if number == self.config.depth - 1:
            return JointBlock(image, Source(width, QKV(width, heads, norm=norm)))
        return JointBlock(image, text)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        picture = as_picture(x, p)
        image = self.embed_patch(patchify(picture, p)) + self._cropped(*self.config.grid(*picture.shape[-2:]))
        text = self.embed_text(cond.text)
        mask = with_image(cond.mask, image)
        c = self.embed_time(t) + self.embed_pooled(cond.pooled) + told(self, cond)

        for block in self.blocks:
            image, text = block(image, text, c, None, mask)

        return unpatchify(self.head(image, c), p, picture.shape).reshape(x.shape)

    def _cropped(self, rows: int, columns: int) -> Tensor:
        """(1, rows columns, D) from the middle of the table."""
        side = self.config.table
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.positions.unflatten(1, (side, side))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2).to(self.embed_patch.weight.dtype)


def sd3_medium() -> MMDiTConfig:
    """Stable Diffusion 3 medium, 2.03B parameters."""
    return MMDiTConfig()


def sd35_medium() -> MMDiTConfig:
    """Stable Diffusion 3.5 medium, an MMDiT-X of 2.24B parameters."""
    return MMDiTConfig(table=384, qk_norm=True, dual=13)


def sd35_large() -> MMDiTConfig:
    """Stable Diffusion 3.5 large, 8.06B parameters."""
    return MMDiTConfig(width=2432, depth=38, heads=38, qk_norm=True)


PRESETS: dict[str, Callable[[], MMDiTConfig]] = {"sd3-medium": sd3_medium, "sd3.5-medium": sd35_medium, "sd3.5-large": sd35_large}
