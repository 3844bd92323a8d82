"""FuseDiT (Tang et al. 2025): a DiT beside a frozen language model, layer by layer.

The DiT has as many blocks as the language model has layers, with heads of the same shape. In each block the image attends to itself
and to the keys and values that the language model has in that layer. The text is causal and never sees the image, so it does not
change from step to step: its keys and values are made once for all of sampling (`text.layers.keys_and_values`), and are all that the DiT
is told. Blocks are Gemma 2's, with norms before and after attention and MLP. In the form that the paper ends with there is no time:
the noise level is read off the image, which cost nothing in its ablation (section 4.2), so t is not used.

Where we differ: the image always stands where the text ends, as in the published training; the published sampling from a cache puts it
at the origin. Logits of the image's queries are not capped, here and there, though Gemma 2 caps its own.

B batch, C channels, N image tokens, L text tokens, K layers, D width, d channels of a head, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import QKV, attend, with_image
from mezzotint.models.blocks import GeGLU, initialise
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import as_picture, image_positions, patchify, rope, rotate, unpatchify


@dataclass
class FuseDiTConfig(DenoiserConfig, kind="fuse_dit"):
    """Sizes of a FuseDiT; as they stand here, those beside Gemma 2 2B.

    depth, heads, kv_heads, head, theta: layers, query heads, key heads, channels of a head and base of the rotations, as the language
    model has them. width: of the DiT alone, the language model's or less. hidden: of the MLP.
    """

    width: int = 2304
    depth: int = 26
    heads: int = 8
    kv_heads: int = 4
    head: int = 256
    hidden: int = 9216
    theta: float = 10_000.0
    patch: int = 2
    channels: int = 16
    prediction: Prediction = "velocity"

    def build(self) -> "FuseDiT":
        return FuseDiT(self)


class FuseDiTBlock(nn.Module):
    """A block of the image, which also attends to the keys and values of a layer of the language model."""

    def __init__(self, config: FuseDiTConfig) -> None:
        super().__init__()
        dim, heads = config.width, config.heads
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (nn.RMSNorm(dim, eps=1e-6) for _ in range(4))
        self.qkv = QKV(dim, heads, kv_heads=config.kv_heads, head=config.head, bias=False, norm="head")
        self.out = nn.Linear(heads * config.head, dim, bias=False)
        self.mlp = GeGLU(dim, config.hidden)

    def forward(self, x: Tensor, said: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), said (B, L, 2 kv_heads d), rotation over x, mask over [said, x] -> x."""
        q, k, v = self.qkv(self.norm_1(x))
        k_text, v_text = said.unflatten(-1, (2, -1, q.shape[-1])).permute(2, 0, 3, 1, 4)  # each (B, kv_heads, L, d)
        keys, values = torch.cat([k_text, rotate(k, rotation)], dim=2), torch.cat([v_text, v], dim=2)
        x = x + self.norm_2(self.out(attend(rotate(q, rotation), keys, values, mask)))
        x = x + self.norm_4(self.mlp(self.norm_3(x)))
        return x


class FuseDiT(nn.Module):
    """(B, C, H, W) or (B, C, 1, H, W), t (B,), Cond with states, keys and values -> velocity of the same shape.

    H and W are multiples of the patch. states are (B, depth, L, 2 kv_heads d), for each layer its keys, rotated, then its values; a
    ValueError where they are missing, or others. At initialisation the output is zero; blocks are no identities.
    """

    def __init__(self, config: FuseDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        patch_size = config.patch**2 * config.channels
        if config.head % 4:
            raise ValueError(f"head must be a multiple of 4, half its channels for rows and half for columns, got {config.head}")
        self.embed_patch = nn.Linear(patch_size, config.width)
        self.blocks = nn.ModuleList(FuseDiTBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, patch_size)
        initialise(self, self.head)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p = self.config.patch
        picture = as_picture(x, p)

        said = self._states(cond)
        image = self.embed_patch(patchify(picture, p))
        rotation = self._rotation(cond, image_positions(1, picture.shape[-2] // p, picture.shape[-1] // p, x.device))
        mask = with_image(cond.states_mask, image)

        for block, layer in zip(self.blocks, said.unbind(1), strict=True):
            image = block(image, layer, rotation, mask)

        return unpatchify(self.head(self.norm(image)), p, picture.shape).reshape(x.shape)

    def _states(self, cond: Cond) -> Tensor:
        """What the blocks read, (B, depth, L, 2 kv_heads d)."""
        depth, width = self.config.depth, 2 * self.config.kv_heads * self.config.head
        if cond.states is None or cond.states.shape[1] != depth or cond.states.shape[3] != width:
            got = "none" if cond.states is None else tuple(cond.states.shape)
            raise ValueError(f"states must be keys and values of a language model's layers, (B, {depth}, L, {width}), got {got}")
        return cond.states

    def _rotation(self, cond: Cond, positions: Tensor) -> Tensor:
        """(B, 1, N, d / 2, 2): half the channels turn with the row and half with the column, both counted from where the text ends."""
        mask, half = cond.masked().states_mask, self.config.head // 2
        assert mask is not None
        return rope(positions[:, 1:] + mask.sum(1)[:, None, None], (half, half), self.config.theta)[:, None]


def fuse_dit_2b() -> FuseDiTConfig:
    """FuseDiT beside Gemma 2 2B, 2.02B parameters of its own."""
    return FuseDiTConfig()


PRESETS: dict[str, Callable[[], FuseDiTConfig]] = {"fuse-dit-2b": fuse_dit_2b}
