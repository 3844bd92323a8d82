"""Our own reward model: an encoder of a picture under a prompt, and a linear head. `methods.reward` trains it from pairs.

The encoder is one of two. `SmallEncoder` is a few convolutions that the prompt shifts and scales (FiLM, Perez et al. 2018), trained from
scratch with the head: minutes on a CPU. `CLIPEncoder` is a frozen CLIP, whose embeddings e of picture and prompt are read as
[e_p, e_c, e_p * e_c]: only the head learns.

B batch, D width.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint import config
from mezzotint.errors import UserError
from mezzotint.pipeline import load_weights
from mezzotint.rewards.clip import CLIP
from mezzotint.rewards.published import beside
from mezzotint.rewards.reward import Reward, RewardConfig
from mezzotint.text import ByteEncoderConfig
from mezzotint.weights.files import read_file, read_json

CONFIG_FILE, WEIGHTS_FILE = "reward.json", "reward.safetensors"
GROUPS = 8  # of GroupNorm: widths are multiples of it


class PairEncoder(nn.Module, ABC):
    """Pictures under prompts to features (B, D)."""

    width: int

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, D) of images (B, 3, H, W) in [-1, 1] of B prompts."""


class PairEncoderConfig(config.Config, ABC, kind="pair_encoder"):
    """Base of the encoders' configurations."""

    @abstractmethod
    def build(self) -> PairEncoder:
        """The encoder."""


@dataclass
class SmallEncoderConfig(PairEncoderConfig, kind="small_encoder"):
    """widths: channels of each level, multiples of 8; a level has half the sides of the one before."""

    widths: tuple[int, ...] = (32, 64, 128)
    text: ByteEncoderConfig = field(default_factory=lambda: ByteEncoderConfig(width=64, heads=2))

    def build(self) -> PairEncoder:
        return SmallEncoder(self)


class SmallEncoder(PairEncoder):
    """Levels of convolutions that the prompt's vector shifts and scales; at first it does neither."""

    def __init__(self, config: SmallEncoderConfig) -> None:
        super().__init__()
        self.text = config.text.build()
        self.width = config.widths[-1]
        self.stem = nn.Conv2d(3, config.widths[0], 3, padding=1)
        before = (config.widths[0], *config.widths[:-1])
        self.levels = nn.ModuleList(Level(a, b, config.text.width) for a, b in zip(before, config.widths, strict=True))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pooled = self.text(prompts).pooled
        x = self.stem(images)
        for level in self.levels:
            x = level(x, pooled)
        out: Tensor = self.norm(x.mean((2, 3)))
        return out


class Level(nn.Module):
    """A residual block under FiLM, and half the sides."""

    def __init__(self, width: int, out: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, affine=False)
        self.film = nn.Linear(condition, 2 * width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, out, 3, stride=2, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        x = x + self.block(F.silu(self.norm(x) * (1 + scale) + shift))
        out: Tensor = self.down(F.silu(x))
        return out


@dataclass
class CLIPEncoderConfig(PairEncoderConfig, kind="clip_encoder"):
    """path: a CLIP in transformers' format."""

    path: str = ""

    def build(self) -> PairEncoder:
        return CLIPEncoder(self)


class CLIPEncoder(PairEncoder):
    """The frozen CLIP is no part of the module: it is in no checkpoint, and copies share it."""

    def __init__(self, config: CLIPEncoderConfig) -> None:
        super().__init__()
        self.clip = CLIP(config.path)
        self.width = 3 * self.clip.width

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        picture, text = self.clip.see(images), self.clip.read(prompts)
        return torch.cat([picture, text, picture * text], dim=1)


@dataclass
class RewardModelConfig(config.Config, kind="reward_model"):
    """The encoder below the head."""

    encoder: PairEncoderConfig = field(default_factory=SmallEncoderConfig)

    def build(self) -> "RewardModel":
        return RewardModel(self)


class RewardModel(nn.Module):
    """Encoder and linear head; a `Reward`. All pictures are rated 0 at first. Differentiable in the pictures."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.encoder.build()
        self.head = nn.Linear(self.encoder.width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        out: Tensor = self.head(self.encoder(images, prompts))[:, 0]
        return out

    def save(self, folder: Path) -> None:
        """Write the model as JSON and safetensors; `LearnedConfig` reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_data(), indent=2) + "\n")


@dataclass
class LearnedConfig(RewardConfig, kind="learned"):
    """A reward model that was trained here. path: the folder it was saved in, or of the run that trained it."""

    path: str = ""

    def build(self) -> Reward:
        folder = next((f for f in (Path(self.path), Path(self.path) / "export" / "reward") if (f / CONFIG_FILE).is_file()), None)
        if not self.path or folder is None:
            raise UserError(f"no reward model at {self.path!r}: expected {CONFIG_FILE} there; `mezzotint train tiny.reward` makes one")
        with torch.device("meta"):  # where nothing is drawn: this happens within a step, whose random numbers are the method's
            model = RewardModelConfig.from_data(read_json(folder / CONFIG_FILE)).build()
        load_weights(model.to_empty(device="cpu"), dict(read_file(folder / WEIGHTS_FILE).items()), folder)
        model.requires_grad_(False).eval()

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            out: Tensor = beside(model, images)(images, prompts)
            return out

        return score
