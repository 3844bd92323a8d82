"""Rewards that are CLIP and little else (Radford et al. 2021), through transformers.

The cosine of picture and prompt, scaled: CLIPScore (Hessel et al. 2021, eq. 1), HPS v2 (Wu et al. 2023), PickScore (Kirstain et al. 2023)
differ in weights and scale only. The aesthetic predictor of LAION (Schuhmann et al. 2022) reads the picture's embedding alone.
All are differentiable in the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.rewards.published import Eye, beside, head, network, pretrained, tokens
from mezzotint.rewards.reward import Reward, RewardConfig


class CLIP:
    """A frozen CLIP from a folder or hub id in transformers' format. Copies share it, and it is part of no module."""

    def __init__(self, place: str) -> None:
        self.model = network("CLIPModel", place)
        self.tokenizer = pretrained("AutoTokenizer", place)
        self.eye = Eye(place, self.model.config.vision_config.image_size)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    @property
    def width(self) -> int:
        """D of the embeddings."""
        width: int = self.model.config.projection_dim
        return width

    def see(self, images: Tensor) -> Tensor:
        """(B, D) unit embeddings of pictures (B, 3, H, W) in [-1, 1]."""
        vision = beside(self.model, images).vision_model(self.eye(images)).pooler_output
        return F.normalize(self.model.visual_projection(vision), dim=1)

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) unit embeddings of prompts, where pictures were last; longer ones are cut, as CLIP's own scores do."""
        said = tokens(self.tokenizer, prompts, self.model.config.text_config.max_position_embeddings, self.model.device)
        text = self.model.text_model(said.input_ids, attention_mask=said.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(text), dim=1)


@dataclass
class CLIPRewardConfig(RewardConfig, kind="clip"):
    """scale * cos(picture, prefix + prompt). path: a CLIP. floor: the least cosine that counts.

    CLIPScore: scale 2.5, floor 0, prefix "A photo depicts ". HPS v2: as it stands. PickScore: scale 0, which stands for the one learned.
    """

    path: str = ""
    scale: float = 1.0
    floor: float = -1.0
    prefix: str = ""

    def build(self) -> Reward:
        clip = CLIP(self.path)
        scale = self.scale or float(clip.model.logit_scale.exp())

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            cosine = (clip.see(images) * clip.read([self.prefix + prompt for prompt in prompts])).sum(1)
            return scale * cosine.clamp_min(self.floor)

        return score


@dataclass
class AestheticConfig(RewardConfig, kind="aesthetic"):
    """The aesthetic predictor, about 1 to 10, whatever the prompt. path: its CLIP (ViT-L/14). head: its layers, as safetensors."""

    path: str = ""
    head: str = ""

    def build(self) -> Reward:
        clip, rate = CLIP(self.path), head(self.head)

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return rate(clip.see(images))

        return score
