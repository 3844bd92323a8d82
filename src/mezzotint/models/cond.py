"""What a picture is asked to be: the conditions that every denoiser takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Cond:
    """A batch of conditions.

    text: (B, L, D) token features. mask: (B, L) bool, True where a token is real; a row of only False is a condition
    that says nothing. pooled: (B, D) one vector for the whole text, zero where it says nothing.
    """

    text: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def index(self, rows: Tensor | slice) -> Self:
        """Some of the rows."""
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> Self:
        """Every row `times` times in a row."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def null(self) -> Self:
        """Conditions of the same shapes that say nothing: what guidance steps away from."""
        return type(self)(torch.zeros_like(self.text), torch.zeros_like(self.mask), torch.zeros_like(self.pooled))

    def drop(self, which: Tensor) -> Self:
        """The rows where `which` (B,) is True replaced by null ones, as training for guidance needs."""
        keep = ~which
        return type(self)(self.text * keep[:, None, None], self.mask & keep[:, None], self.pooled * keep[:, None])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Batches one after the other; shorter texts are padded with masked tokens."""
        length = max(part.text.shape[1] for part in parts)
        text = [F.pad(part.text, (0, 0, 0, length - part.text.shape[1])) for part in parts]
        mask = [F.pad(part.mask, (0, length - part.mask.shape[1])) for part in parts]
        return cls(torch.cat(text), torch.cat(mask), torch.cat([part.pooled for part in parts]))
