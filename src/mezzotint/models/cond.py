"""What a picture is asked to be: the conditions that every denoiser takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Along which axis a field counts tokens: batches of unlike lengths are padded there.
TOKENS = {"text": 1, "mask": 1, "states": 2, "states_mask": 1, "tokens": 1}
# What is zero, or False, where a condition says nothing, and what is -1 there.
SAID = ("text", "mask", "pooled", "states", "states_mask")
NUMBERED = ("label", "tokens")
# What a network computes with; numbers that it embeds keep their precision.
FEATURES = ("text", "pooled", "states", "control")


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device. To a GPU it goes from pinned memory: else the host would wait there until the GPU has caught up."""
    if tensor.is_cpu and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class Cond:
    """A batch of conditions.

    text: (B, L, D) token features. mask: (B, L) bool, True where a token is real; a row of only False is a condition
    that says nothing; None where every token is real, which spares attention the mask. pooled: (B, D) one vector for the
    whole text, zero where it says nothing.

    The rest is None for models that do not ask for it. label: (B,) int64 number of a class, -1 where it says nothing.
    tokens: (B, L) int64 numbers of a text's tokens, -1 where there is none, for models with a vocabulary of their own. guidance:
    (B,) the scale that a guidance-distilled model imitates. jump: (B,) how far a network that predicts a mean velocity looks ahead, in time
    towards data, 0 for the velocity itself. size: (B, 2) height and width in pixels of the picture. states: (B, K,
    L', D') of K layers of a language model, its hidden states or its keys and values; states_mask: (B, L') as mask. control: (B, C',
    H, W) latents that the model reads beside x, place by place. origin: (B, 4) height and width that the picture had before it
    was resized, and top and left of its crop, in pixels. keep: (B, K) int64 numbers of the image's patches that the network works on,
    for training on a part of them; None where it is all of them.
    """

    text: Tensor
    mask: Tensor | None
    pooled: Tensor
    label: Tensor | None = None
    guidance: Tensor | None = None
    size: Tensor | None = None
    states: Tensor | None = None
    states_mask: Tensor | None = None
    control: Tensor | None = None
    origin: Tensor | None = None
    tokens: Tensor | None = None
    jump: Tensor | None = None
    keep: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    @classmethod
    def of_classes(cls, label: Tensor) -> Self:
        """Classes (B,) without a text."""
        return cls._untold(label, label=label)

    @classmethod
    def of_tokens(cls, tokens: Tensor) -> Self:
        """Texts by the numbers of their tokens (B, L)."""
        return cls._untold(tokens, tokens=tokens)

    @classmethod
    def of_states(cls, states: Tensor, mask: Tensor | None = None) -> Self:
        """Texts by what a language model makes of them (B, K, L', D'), and the mask over it (B, L')."""
        return cls._untold(states, states=states, states_mask=mask)

    @classmethod
    def _untold(cls, rows: Tensor, **given: Tensor | None) -> Self:
        """Conditions without text features, as many as there are rows."""
        nothing = torch.zeros(len(rows), 0, device=rows.device)
        return cls(nothing[..., None], None, nothing, **given)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **{name: function(value) for name, value in given.items()})

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self._map(lambda tensor: sent(tensor, device))

    def in_precision(self, dtype: torch.dtype) -> Self:
        """The same with its features in the precision of a network."""
        return replace(self, **{name: value.to(dtype) for name in FEATURES if (value := getattr(self, name)) is not None})

    def index(self, rows: Tensor | slice) -> Self:
        """Some of the rows."""
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> Self:
        """Every row `times` times in a row."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def masked(self) -> Self:
        """The same with its masks spelled out."""
        mask, states_mask = self.mask, self.states_mask
        if mask is None:
            mask = self.text.new_ones(self.text.shape[:2], dtype=torch.bool)
        if states_mask is None and self.states is not None:
            states_mask = self.states.new_ones(len(self), self.states.shape[2], dtype=torch.bool)
        return replace(self, mask=mask, states_mask=states_mask)

    def null(self) -> Self:
        """Conditions of the same shapes that say nothing. Guidance, jump, size, control, origin and kept patches stay."""
        whole = self.masked()
        nothing = {name: torch.zeros_like(value) for name in SAID if (value := getattr(whole, name)) is not None}
        unnumbered = {name: torch.full_like(value, -1) for name in NUMBERED if (value := getattr(whole, name)) is not None}
        return replace(whole, **nothing, **unnumbered)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Batches one after the other; shorter texts are padded with masked tokens.

        ValueError where a condition is given in some of the batches only.
        """
        if len({part._lengths() for part in parts}) > 1:
            parts = [part.masked() for part in parts]
        joined: dict[str, Any] = {f.name: _join(f.name, [getattr(part, f.name) for part in parts]) for f in fields(cls)}
        return cls(**joined)

    def _lengths(self) -> tuple[int | None, ...]:
        values = [(getattr(self, name), axis) for name, axis in TOKENS.items()]
        return tuple(None if value is None else value.shape[axis] for value, axis in values)


def _join(name: str, values: Sequence[Tensor | None]) -> Tensor | None:
    given = [value for value in values if value is not None]
    if not given:
        return None
    if len(given) < len(values):
        raise ValueError(f"{name} must be given in all batches or in none, got it in {len(given)} of {len(values)}")
    if (axis := TOKENS.get(name)) is not None:
        length, after = max(value.shape[axis] for value in given), given[0].ndim - 1 - axis
        nothing = -1 if name in NUMBERED else 0
        given = [F.pad(value, (0, 0) * after + (0, length - value.shape[axis]), value=nothing) for value in given]
    return torch.cat(given)
