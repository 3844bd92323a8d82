"""Conditions beyond a text: what is joined, cut and said nothing of."""

import pytest
import torch

from mezzotint.models import Cond


def whole(rows: int, length: int, states: int = 3) -> Cond:
    """A batch with every condition there is, and no masks."""
    draw = torch.Generator().manual_seed(rows)
    return Cond(
        text=torch.randn(rows, length, 4, generator=draw),
        mask=None,
        pooled=torch.randn(rows, 5, generator=draw),
        label=torch.arange(rows),
        guidance=torch.full((rows,), 3.5),
        size=torch.full((rows, 2), 64.0),
        states=torch.randn(rows, 2, states, 6, generator=draw),
        control=torch.randn(rows, 3, 8, 8, generator=draw),
        origin=torch.full((rows, 4), 32.0),
        tokens=torch.arange(rows * length).reshape(rows, length),
    )


def equal(a: Cond, b: Cond) -> bool:
    pairs = [(x, getattr(b, name)) for name, x in vars(a).items()]
    return all(torch.equal(x, y) if x is not None and y is not None else x is y for x, y in pairs)


def test_a_mask_appears_where_lengths_differ_and_not_before() -> None:
    same = Cond.cat([whole(2, 3), whole(1, 3)])
    assert same.mask is None
    assert same.states_mask is None
    unlike = Cond.cat([whole(2, 3), whole(1, 5, states=1)])
    assert unlike.mask is not None
    assert unlike.mask.sum(1).tolist() == [3, 3, 5]
    assert unlike.states_mask is not None
    assert unlike.states_mask.sum(1).tolist() == [3, 3, 1]
    assert torch.equal(unlike.index(slice(0, 2)).text[:, :3], whole(2, 3).text)
    assert not unlike.text[:2, 3:].any()
    assert unlike.tokens is not None
    assert unlike.tokens.tolist() == [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1], [0, 1, 2, 3, 4]]


def test_what_is_joined_can_be_cut_again() -> None:
    both = Cond.cat([whole(2, 3), whole(3, 3)])
    assert len(both) == 5
    assert equal(both.index(slice(0, 2)), whole(2, 3))
    assert equal(both.index(slice(2, 5)), whole(3, 3))
    assert equal(whole(2, 3).repeat(2).index(slice(0, 4, 2)), whole(2, 3))


def test_a_condition_in_some_batches_only_is_an_error() -> None:
    without = whole(1, 3)
    without.guidance = None
    with pytest.raises(ValueError, match="guidance must be given in all batches or in none, got it in 1 of 2"):
        Cond.cat([whole(2, 3), without])


def test_null_says_nothing_but_still_says_how() -> None:
    cond = whole(2, 3)
    null = cond.null()
    assert null.mask is not None
    assert null.states_mask is not None
    assert not any(x.any() for x in (null.text, null.mask, null.pooled, null.states, null.states_mask) if x is not None)
    assert null.label is not None
    assert null.label.tolist() == [-1, -1]
    assert null.tokens is not None
    assert null.tokens.tolist() == [[-1] * 3] * 2
    for name in ("guidance", "size", "control", "origin"):
        assert torch.equal(getattr(null, name), getattr(cond, name))


def test_tokens_and_states_need_no_text() -> None:
    tokens = Cond.of_tokens(torch.tensor([[3, 1], [4, -1]]))
    assert len(tokens) == 2
    assert Cond.cat([tokens, tokens.null()]).tokens.tolist() == [[3, 1], [4, -1], [-1, -1], [-1, -1]]  # type: ignore[union-attr]
    states = Cond.of_states(torch.randn(2, 3, 4, 5), torch.tensor([[True] * 4, [True, False, True, False]]))
    assert len(states) == 2
    assert not states.null().states_mask.any()  # type: ignore[union-attr]


def test_classes_need_no_text() -> None:
    cond = Cond.of_classes(torch.tensor([3, 1]))
    assert len(cond) == 2
    assert cond.null().label.tolist() == [-1, -1]  # type: ignore[union-attr]
    assert len(Cond.cat([cond, cond.null()])) == 4
