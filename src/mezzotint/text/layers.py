"""What a frozen language model has in each of its layers for a text, for denoisers that attend to it (FuseDiT, Tang et al. 2025)."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def keys_and_values(llm: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, K, L, 2 kv_heads d) for `Cond.states`: for each of the K layers its keys, rotated, then its values.

    llm: a causal model of transformers with rotary positions (Gemma, Llama, Qwen), without or with its head; it gets no gradient.
    tokens: (B, L) numbers; mask: (B, L) bool, True where a token is real, wherever the padding stands. A key's channels are put in
    neighbouring pairs, as `embed.rotate` turns them; transformers turns a channel of the first half with one of the second.
    """
    from transformers import DynamicCache

    place = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()  # of whole layers, where Gemma's own keeps a window of some
    llm(tokens, attention_mask=mask.long(), position_ids=place, past_key_values=cache, use_cache=True)
    layers = [(layer.keys.unflatten(-1, (2, -1)).mT.flatten(-2), layer.values) for layer in cache.layers]
    return torch.stack([torch.cat([part.transpose(1, 2).flatten(2) for part in layer], dim=-1) for layer in layers], dim=1)
