"""Arguments outside their range are named, with the range."""

import math

import pytest
import torch

from mezzotint.flow.domain import above, within


def test_what_lies_inside_passes() -> None:
    within(0, 1, a=0, b=1.0, c=torch.tensor([0.0, 0.5, 1.0]), d=torch.empty(0))
    above(0, a=1e-9, b=torch.tensor([0.1, 2.0]))
    within(1, math.inf, steps=10**9)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, torch.tensor([0.5, 1.5]), torch.tensor([0.5, math.nan])])
def test_what_lies_outside_is_named_with_the_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"share must be within \[0, 1\], got"):
        within(0, 1, fine=0.5, share=value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.inf])])
def test_what_is_not_above_is_named(value: float) -> None:
    with pytest.raises(ValueError, match="std must be finite and above 0, got"):
        above(0, std=value)


def test_tensors_elsewhere_are_taken_on_trust() -> None:
    within(0, 1, t=torch.full((3,), 7.0, device="meta"))


def test_a_compiled_function_is_not_broken_by_the_question() -> None:
    def conversion(t: torch.Tensor) -> torch.Tensor:
        within(0, 1, t=t)
        return 2 * t

    compiled = torch.compile(conversion, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.tensor([0.2])), torch.tensor([0.4]))
