"""Prompts that name classes."""

import pytest
import torch

from mezzotint.errors import UserError
from mezzotint.text.classes import ClassesConfig

NAMES = ("tench, Tinca tinca", "goldfish", "crane", "", "Crane, hoist")


def test_a_prompt_is_a_name_or_a_number() -> None:
    cond = ClassesConfig(NAMES).build()(["goldfish", "Tinca Tinca ", "hoist", "3", "0", ""])
    assert cond.label is not None
    assert cond.label.tolist() == [1, 0, 4, 3, 0, -1]
    assert torch.equal(cond.index(torch.tensor([5])).label, cond.null().label[:1])  # type: ignore[arg-type, index]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("goldfsh", "unknown class 'goldfsh'; did you mean 'goldfish'"),
        ("5", "no class 5: they have numbers from 0 to 4"),
        ("crane", "several classes are called 'crane': give one of their numbers, 2, 4"),
    ],
)
def test_what_no_class_is_called_is_one_line(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        ClassesConfig(NAMES).build()([prompt])
    assert "\n" not in str(error.value)


def test_an_error_does_not_list_a_thousand_names() -> None:
    with pytest.raises(UserError, match=r"known: class 0, class 1, .* and 960 more$"):
        ClassesConfig(tuple(f"class {k}" for k in range(1000))).build()(["zzz"])
