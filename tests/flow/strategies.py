"""What property tests draw from: shapes of pictures and videos, precisions, grids."""

import torch
from hypothesis import strategies as st
from torch import Tensor

PICTURES = st.tuples(*[st.integers(1, 3)] * 4)
VIDEOS = st.tuples(*[st.integers(1, 3)] * 5)
SHAPES = st.one_of(PICTURES, VIDEOS)
DTYPES = st.sampled_from([torch.float32, torch.float64])
# Ends, what is next to them, and anything between.
TIMES = st.one_of(st.sampled_from([0.0, 5e-324, 1e-12, 1e-3, 0.5, 0.999, 1 - 1e-7, 1.0]), st.floats(0, 1))


def falling(lowest: float = 0.0, highest: float = 1.0) -> st.SearchStrategy[Tensor]:
    """Grids of 1 to 12 steps that fall anyhow, or stand still."""
    numbers = st.lists(st.one_of(st.floats(lowest, highest), st.sampled_from([lowest, highest])), min_size=2, max_size=13)
    return numbers.map(lambda times: torch.tensor(sorted(times, reverse=True), dtype=torch.float64))


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
