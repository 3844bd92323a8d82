"""How much of the words that a prompt asks for a picture shows, as Flow-GRPO rewards it (Liu et al. 2025, section 4).

    r = 1 - min(N, distance(read, asked)) / N,    N = len(asked)

with the Levenshtein distance, case and spaces aside, and distance 0 where the words are within what was read. The words asked for stand
in the prompt between quotation marks. No gradient. Where we differ: the reader is a TrOCR (Li et al. 2021) through transformers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.rewards.published import Eye, beside, network, pretrained
from mezzotint.rewards.reward import Reward, RewardConfig

QUOTED = re.compile(r"[\"“](.+?)[\"”]")


@dataclass
class OCRConfig(RewardConfig, kind="ocr"):
    """path: the reader, a VisionEncoderDecoderModel. length: tokens that it reads at most. ValueError for a prompt without quoted words."""

    path: str = ""
    length: int = 32

    def build(self) -> Reward:
        reader, tokenizer = network("VisionEncoderDecoderModel", self.path), pretrained("AutoTokenizer", self.path)
        eye = Eye(self.path, reader.config.encoder.image_size, cut=False)

        @torch.no_grad()
        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            asked = [words(prompt) for prompt in prompts]
            seen = beside(reader, images).generate(eye(images), max_length=self.length)
            read = tokenizer.batch_decode(seen, skip_special_tokens=True)
            return torch.tensor([spelled(a, r) for a, r in zip(asked, read, strict=True)], device=images.device)

        return score


def words(prompt: str) -> str:
    """What a prompt asks to be written. ValueError where it has no quoted words."""
    if not (found := QUOTED.findall(prompt)):
        raise ValueError(f"prompts must say in quotation marks what is to be written, got {prompt!r}")
    return " ".join(found)


def spelled(asked: str, read: str) -> float:
    """The reward of reading `read` where `asked` was to be written, within [0, 1]."""
    asked, read = ("".join(text.lower().split()) for text in (asked, read))
    return 1.0 if asked in read else 1 - min(len(asked), _distance(asked, read)) / len(asked)


def _distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest letters to put in, take out or change."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]
