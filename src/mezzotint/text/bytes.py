"""A text encoder without a vocabulary: bytes make words, words make tokens. Trained with the model.

A word is a run of letters and digits, or one punctuation mark; its vector is the sum of one embedding for each (place in
the word, byte), so that any text in any language has a token for each word, and no tokenizer file is needed.

Neighbours are mixed by a convolution over words, so that "red" reaches "star" at once, and then by transformer blocks
that start as identities: a bag of words is there from the first step, and order is learned on top of it.

B batch, L words, W bytes of a word, D width.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.models.blocks import Block
from mezzotint.models.cond import Cond
from mezzotint.models.embed import rope, sinusoid
from mezzotint.text.encoder import TextConfig, TextEncoder

NEIGHBOURS = 5  # words that a word's convolution sees: two to either side

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass
class ByteEncoderConfig(TextConfig, kind="bytes"):
    """Sizes. word_bytes: longer words are cut into several tokens. max_words: longer texts are cut, with a warning."""

    width: int = 128
    depth: int = 1
    heads: int = 4
    word_bytes: int = 12
    max_words: int = 64

    def build(self) -> "ByteEncoder":
        return ByteEncoder(self)


@lru_cache(maxsize=1 << 16)
def _numbers(word: bytes, size: int) -> tuple[int, ...]:
    """A word's rows in the embedding table, padded with 0 to `size`."""
    return tuple(1 + 256 * place + byte for place, byte in enumerate(word)) + (0,) * (size - len(word))


class ByteEncoder(TextEncoder):
    """Prompts -> Cond: text (B, L, D), mask (B, L), pooled (B, D). L is the longest prompt's word count, at least 1."""

    def __init__(self, config: ByteEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.EmbeddingBag(config.word_bytes * 256 + 1, config.width, mode="sum", padding_idx=0)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.norm_words = nn.LayerNorm(config.width)
        self.neighbours = nn.Conv1d(config.width, config.width, NEIGHBOURS, padding=NEIGHBOURS // 2)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, prompts: Sequence[str]) -> Cond:
        tokens = self.tokens(prompts).to(self.embed.weight.device, non_blocking=True)
        mask = tokens.any(dim=2)
        words = self.norm_words(self.embed(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])) * mask[..., None]
        words = words + self.neighbours(words.mT).mT
        place = torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        x = words + sinusoid(place, self.config.width).to(words.dtype)
        rotation = rope(place[:, None], (self.config.width // self.config.heads,))
        # A masked query attends to something too, or an empty prompt would divide nothing by nothing.
        keys = mask | ~mask.any(dim=1, keepdim=True)
        for block in self.blocks:
            x = block(x, rotation, keys)
        text = self.norm(x) * mask[..., None]
        pooled = F.layer_norm(text.sum(1), (self.config.width,)) * mask.any(dim=1, keepdim=True)
        return Cond(text, mask, pooled)

    def store(self, folder: Path) -> ByteEncoderConfig:
        return self.config

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, W) int64 on the CPU: 0 where there is no byte, else 1 + 256 * place in the word + byte."""
        rows = [self._words(prompt) for prompt in prompts]
        length, size = max([1, *map(len, rows)]), self.config.word_bytes
        nothing = (0,) * size
        padded = [[_numbers(word, size) for word in words] + [nothing] * (length - len(words)) for words in rows]
        return torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(rows), length, size)

    def _words(self, prompt: str) -> list[bytes]:
        size = self.config.word_bytes
        whole = [word.encode("utf-8", errors="replace") for word in _WORD.findall(prompt.lower())]
        words = [word[i : i + size] for word in whole for i in range(0, len(word), size)]
        if len(words) > self.config.max_words:
            warnings.warn(f"prompt cut from {len(words)} to {self.config.max_words} words: {prompt[:60]!r}...", stacklevel=2)
        return words[: self.config.max_words]
