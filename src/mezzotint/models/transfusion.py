"""Transfusion (Zhou et al. 2024): a language model that also draws. One transformer reads the numbers of a text's tokens and, after
them, the patches of an image.

Text is causal, and sees no image; every patch sees the text, the token that begins an image (BOI) and all patches (figure 4). The blocks
are Llama's, with positions counted over the whole sequence, patches in reading order. The time is added to the patches, and is
told to nothing else. What the text's tokens become is a language model's: `with_logits` gives it beside the picture.

Where we differ: the paper predicts the noise of a variance-preserving path, and names flow matching as future work; this predicts
the velocity. The time joins the patches behind their linear layer instead of before it. A text comes before its image, and one image
is drawn: interleaved documents, U-Net blocks around the patches and the token after an image are not here. The mask over text and
image is never made: each of the two has an attention of its own.

B batch, C channels, F frames, N image tokens, L text tokens, M = L + 1 with BOI, D width, V vocabulary, d channels of a head, p patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.flow.path import Prediction
from mezzotint.models.attention import QKV, attend, with_image
from mezzotint.models.blocks import SwiGLU, initialise
from mezzotint.models.cond import Cond
from mezzotint.models.denoiser import DenoiserConfig
from mezzotint.models.embed import TimeEmbedding, as_video, patchify, rope, rotate, unpatchify


@dataclass
class TransfusionConfig(DenoiserConfig, kind="transfusion"):
    """Sizes of a Transfusion; as they stand here, those of 7B.

    hidden: of the MLP. vocabulary: tokens have numbers from 0 to one less; the last is BOI, which the network places itself. The
    published text is that of Llama 2, which has 32,000 without it.
    """

    width: int = 4096
    depth: int = 32
    heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32_001
    patch: int = 2
    channels: int = 8
    prediction: Prediction = "velocity"

    def build(self) -> "Transfusion":
        return Transfusion(self)


def attend_mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention that is causal over text, the first M of T tokens, which see no image; the image's see all.

    q, k, v (B, heads, T, d), mask (B, M) bool, True for those of the text that may be attended -> (B, T, heads d).
    """
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    text = attend(q[:, :, :length], k[:, :, :length], v[:, :, :length], causal & mask[:, None])
    image = attend(q[:, :, length:], k, v, with_image(mask, q[:, 0, length:]))
    return torch.cat([text, image], dim=1)


class TransfusionBlock(nn.Module):
    """Llama's block (Touvron et al. 2023) with Transfusion's attention."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.width, eps=1e-5)
        self.qkv = QKV(config.width, config.heads, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm_mlp = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        """x (B, M + N, D), rotation over x, mask over its text (B, M) -> x."""
        q, k, v = self.qkv(self.norm_attention(x))
        x = x + self.out(attend_mixed(rotate(q, rotation), rotate(k, rotation), v, mask))
        x = x + self.mlp(self.norm_mlp(x))
        return x


class Transfusion(nn.Module):
    """(B, C, H, W) or (B, C, F, H, W), t (B,), Cond with tokens -> velocity of the same shape.

    H and W are multiples of the patch. ValueError where tokens are missing. At initialisation the output
    is zero; blocks are no identities.
    """

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        width, patch_size = config.width, config.patch**2 * config.channels
        self.embed_patch = nn.Linear(patch_size, width)
        self.embed_time = TimeEmbedding(width)
        self.embed_token = nn.Embedding(config.vocabulary, width)
        self.blocks = nn.ModuleList(TransfusionBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, patch_size)
        self.head_token = nn.Linear(width, config.vocabulary, bias=False)
        initialise(self, self.head)
        nn.init.normal_(self.embed_token.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self._picture(self._read(x, t, cond)[1], x)

    def with_logits(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The velocity, and logits (B, L, V) of the token that follows each of the text, for a language loss from the same forward.

        What follows the last is BOI. Logits where there is no token mean nothing.
        """
        text, image = self._read(x, t, cond)
        return self._picture(image, x), self.head_token(text)

    def _read(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """What becomes of the text's tokens (B, L, D) and of the image's (B, N, D)."""
        if cond.tokens is None:
            raise ValueError(f"tokens must be given to this network: (B, L) numbers below {self.config.vocabulary - 1}, -1 for none")
        numbers = F.pad(cond.tokens, (0, 1), value=self.config.vocabulary - 1)
        text, mask = self.embed_token(numbers.clamp(min=0)), numbers >= 0
        image = self.embed_patch(patchify(as_video(x, self.config.patch), self.config.patch)) + self.embed_time(t)[:, None]
        rotation = self._rotation(mask, image)

        tokens = torch.cat([text, image], dim=1)
        for block in self.blocks:
            tokens = block(tokens, rotation, mask)

        text, _, image = self.norm(tokens).split([cond.tokens.shape[1], 1, image.shape[1]], dim=1)
        return text, image

    def _rotation(self, mask: Tensor, image: Tensor) -> Tensor:
        """(B, 1, M + N, d / 2, 2): tokens that are there are counted, text (B, M) before image (B, N, D)."""
        place = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1).cumsum(1) - 1
        return rope(place[..., None], (self.config.width // self.config.heads,))[:, None]

    def _picture(self, image: Tensor, x: Tensor) -> Tensor:
        """The image's tokens as a velocity in the shape of x."""
        return unpatchify(self.head(image), self.config.patch, as_video(x, self.config.patch).shape).reshape(x.shape)


def transfusion_7b() -> TransfusionConfig:
    """Transfusion 7B, which has Llama 2's transformer (table 2)."""
    return TransfusionConfig()


def transfusion_1400m() -> TransfusionConfig:
    """Transfusion 1.4B."""
    return transfusion_7b().replace(width=2048, depth=24, heads=16, hidden=5632)


def transfusion_760m() -> TransfusionConfig:
    """Transfusion 0.76B."""
    return transfusion_1400m().replace(width=1536, heads=24, hidden=4096)


def transfusion_370m() -> TransfusionConfig:
    """Transfusion 0.37B."""
    return transfusion_1400m().replace(width=1024, hidden=2816)


def transfusion_160m() -> TransfusionConfig:
    """Transfusion 0.16B."""
    return transfusion_7b().replace(width=768, depth=16, heads=12, hidden=2048)


PRESETS: dict[str, Callable[[], TransfusionConfig]] = {
    "transfusion-7b": transfusion_7b,
    "transfusion-1400m": transfusion_1400m,
    "transfusion-760m": transfusion_760m,
    "transfusion-370m": transfusion_370m,
    "transfusion-160m": transfusion_160m,
}
