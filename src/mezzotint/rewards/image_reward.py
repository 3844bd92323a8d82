"""ImageReward (Xu et al. 2023): BLIP's text encoder reads the prompt as it looks at the picture; a stack of layers rates its first token.

    r = (head(BLIP(picture, prompt)[CLS]) - mean) / std

Differentiable in the picture. Where we differ: weights are read as safetensors under transformers' names for BLIP.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mezzotint.rewards.published import Eye, beside, head, network, pretrained, tokens
from mezzotint.rewards.reward import Reward, RewardConfig

LENGTH = 35  # tokens of a prompt; longer ones are cut


@dataclass
class ImageRewardConfig(RewardConfig, kind="image_reward"):
    """path: the BLIP, a BlipForImageTextRetrieval. head: its layers. mean, std: of the published head's scores."""

    path: str = ""
    head: str = ""
    mean: float = 0.16717
    std: float = 1.0333

    def build(self) -> Reward:
        blip, rate, tokenizer = network("BlipForImageTextRetrieval", self.path), head(self.head), pretrained("AutoTokenizer", self.path)
        eye = Eye(self.path, blip.config.vision_config.image_size)

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            said = tokens(tokenizer, prompts, LENGTH, images.device)
            seen = beside(blip, images).vision_model(eye(images)).last_hidden_state
            read = blip.text_encoder(said.input_ids, attention_mask=said.attention_mask, encoder_hidden_states=seen)
            return (rate(read.last_hidden_state[:, 0]) - self.mean) / self.std

        return score
