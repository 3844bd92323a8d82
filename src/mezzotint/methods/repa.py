"""Representation alignment (REPA, Yu et al. 2024, eq. 8): flow matching whose hidden states are drawn towards a vision encoder's.

    L = L_flow + weight * mean_{b,n} [ -cos(z_n, P(h_n)) ]

z are the patches of the clean picture as a frozen encoder sees them, h the tokens of the noised one after a block of the student,
and P is an MLP of three layers with SiLU, which is a role of its own and is not exported. From step `stop` on there is only
L_flow: late in training the alignment may hurt (HASTE, Wang et al. 2025).

Where we differ: the encoder sees the picture at a size where it has as many patches a side as the student, or `LEAST` if that is
more, and its patches are then interpolated to the student's grid. Blocks are read by a hook, so any network with a list of blocks
over tokens will do; one over maps (UNet, UViT) has none and is refused.

B pictures, N image tokens, D width of the student, E of the encoder, r rows and c columns of patches.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint import config
from mezzotint.data.batch import Batch
from mezzotint.errors import UserError
from mezzotint.methods.denoise import Denoise, DenoiseConfig
from mezzotint.methods.method import Method, MethodConfig, Metrics, Role, Turn
from mezzotint.methods.teacher import image_tokens
from mezzotint.models.denoiser import blocks
from mezzotint.pipeline import Pipeline, load

LEAST = 16  # patches a side that an encoder sees at least
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours in [0, 1], which such encoders expect


class VisionConfig(config.Config, ABC, kind="vision"):
    """Base of the encoders' configurations."""

    @abstractmethod
    def build(self) -> "Vision":
        """The encoder, frozen."""


class Vision(nn.Module, ABC):
    """Pictures (B, 3, H, W) in [-1, 1] and a grid (r, c) -> features (B, E, r, c) float32. width: E. network: what has the blocks."""

    width: int

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network whose blocks make the features."""

    @abstractmethod
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The features."""


@dataclass
class TransformersConfig(VisionConfig, kind="transformers"):
    """weights: a folder, or a hub's id, of a vision transformer such as DINOv2 (needs the extra "text")."""

    weights: str = "facebook/dinov2-base"

    def build(self) -> "Transformers":
        try:
            import transformers

            with torch.device("cpu"):
                model = transformers.AutoModel.from_pretrained(self.weights, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"cannot read a vision encoder from {self.weights} ({' '.join(str(error).split())[:200]})") from error
        return Transformers(model)


class Transformers(Vision):
    """A vision transformer's last hidden states, normalised as the encoder has it, without tokens that stand before the patches."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.width, self.patch = model.config.hidden_size, model.config.patch_size
        for name, colours in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(colours)[:, None, None], persistent=False)

    @property
    def network(self) -> nn.Module:
        module: nn.Module = self.model
        return module

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        times = max(1, math.ceil(LEAST / min(grid)))
        rows, columns = (times * side for side in grid)
        size = (rows * self.patch, columns * self.patch)
        seen = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        tokens = self.model(((seen + 1) / 2 - self.mean) / self.deviation, interpolate_pos_encoding=True).last_hidden_state
        return resized(tokens[:, -rows * columns :].float().mT.unflatten(2, (rows, columns)), grid)


@dataclass
class OwnConfig(VisionConfig, kind="own"):
    """A network that was trained here serves as the encoder: what it makes of the clean picture, without a caption.

    weights: its pipeline, as in `pipeline.load`. layer: the block that is read, from 1.
    """

    weights: str = "starter"
    layer: int = 3

    def build(self) -> "Own":
        with torch.device("cpu"):
            return Own(self, load(self.weights))


class Own(Vision):
    """Tokens of a pipeline's denoiser at t = 0."""

    def __init__(self, config: OwnConfig, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline, self.layer = pipeline.requires_grad_(False).eval(), config.layer
        self.width = hidden_width(pipeline, config.layer)

    @property
    def network(self) -> nn.Module:
        return self.pipeline.denoiser

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        x0 = self.pipeline.codec.encode(images)
        with Tap(self.pipeline, self.layer, images) as tap:
            self.pipeline.velocity(x0, x0.new_zeros(len(x0)), self.pipeline.encode([""] * len(x0)))
        return resized(tap.tokens().float().mT.unflatten(2, tap.grid), grid)


def resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features (B, E, r, c) on another grid, averaged where it is coarser."""
    if features.shape[2:] == grid:
        return features
    return F.interpolate(features, grid, mode="bilinear", antialias=True, align_corners=False)


class Tap:
    """While active, remembers what a block of a pipeline's denoiser gives for pictures like `images`. grid: rows and columns of tokens."""

    def __init__(self, pipeline: Pipeline, layer: int, images: Tensor) -> None:
        self.block = blocks(pipeline.denoiser)[layer - 1]
        self.grid = pipeline.grid((images.shape[-2], images.shape[-1]))
        self.answers: list[Tensor] = []

    def __enter__(self) -> "Tap":
        def answered(module: nn.Module, arguments: Any, answer: Any) -> None:
            self.answers = [answer] if isinstance(answer, Tensor) else list(answer)

        self._handle = self.block.register_forward_hook(answered)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def tokens(self) -> Tensor:
        """(B, N, D). ValueError for a network whose blocks have no tokens."""
        tokens = image_tokens(self.answers, self.grid[0] * self.grid[1])
        if tokens is None:
            raise ValueError("layer must be a block over tokens, and this network has maps there")
        return tokens


def hidden_width(pipeline: Pipeline, layer: int) -> int:
    """D after a block. ValueError for a layer that is not there, and for a network without a single width."""
    fields, number = vars(pipeline.config.denoiser), len(blocks(pipeline.denoiser))
    if "width" not in fields:
        raise ValueError(f"layer must be a block over tokens, and a {pipeline.config.denoiser.kind} has maps")
    if not 1 <= layer <= number:
        raise ValueError(f"layer must be within [1, {number}], got {layer}")
    return int(fields["width"])


@dataclass
class REPAConfig(MethodConfig, kind="repa"):
    """flow: the rest of the loss. vision: the encoder. layer: the block that is aligned, from 1. weight: of the alignment.

    stop: the step from which there is none, 0 for never. hidden: width of the projector.
    """

    flow: DenoiseConfig = field(default_factory=DenoiseConfig)
    vision: VisionConfig = field(default_factory=TransformersConfig)
    layer: int = 8
    weight: float = 0.5
    stop: int = 0
    hidden: int = 2048

    def build(self, pipeline: Pipeline) -> "REPA":
        return REPA(self, pipeline)


class REPA(Method):
    """Roles: the student; the projector; the frozen encoder."""

    def __init__(self, config: REPAConfig, pipeline: Pipeline) -> None:
        self.config = config
        if config.flow.mask:
            raise ValueError(f"flow.mask must be 0, since all patches of the student are aligned, got {config.flow.mask}")
        self.flow = Denoise(config.flow, pipeline)
        vision = config.vision.build()
        widths = (hidden_width(pipeline, config.layer), config.hidden, config.hidden, vision.width)
        first, second, third = (nn.Linear(a, b) for a, b in pairwise(widths))
        projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
        self.roles = {
            **self.flow.roles,
            "projector": Role(projector),
            "vision": Role(vision, trained=False),
        }

    def turns(self, step: int) -> Sequence[Turn]:
        return [("student", "projector") if self._aligned(step) else ("student",)]

    def loss(self, batch: Batch, turn: Turn, step: int) -> tuple[Tensor, Metrics]:
        if not self._aligned(step):
            return self.flow.loss(batch, turn, step)
        with Tap(self.student, self.config.layer, batch.images) as tap:
            loss, metrics = self.flow.loss(batch, turn, step)
        with torch.no_grad():
            target = self.roles["vision"].module(batch.images, tap.grid).flatten(2).mT
        likeness = F.cosine_similarity(self.roles["projector"].module(tap.tokens()).float(), target, dim=-1)
        return loss - self.config.weight * likeness.mean(), {**metrics, "likeness": likeness.detach().mean(1)}

    def _aligned(self, step: int) -> bool:
        return not self.config.stop or step < self.config.stop
