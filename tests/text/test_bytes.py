"""The byte-level encoder."""

import pytest
import torch

from mezzotint.text import ByteEncoder, ByteEncoderConfig


@pytest.fixture
def encoder() -> ByteEncoder:
    torch.manual_seed(0)
    return ByteEncoderConfig(width=32, heads=2, max_words=8).build()


def test_the_empty_prompt_is_the_null_condition(encoder: ByteEncoder) -> None:
    cond = encoder(["", "a star"])
    null = cond.null()
    assert not cond.mask[0].any()
    assert torch.equal(cond.text[0], null.text[0])
    assert torch.equal(cond.pooled[0], null.pooled[0])
    assert cond.text.isfinite().all()


def test_a_prompts_features_do_not_depend_on_its_neighbours(encoder: ByteEncoder) -> None:
    alone, together = encoder(["a red star"]), encoder(["a red star", "two blue circles on a grey background"])
    assert torch.allclose(alone.text[0], together.text[0, :3], atol=1e-5)
    assert torch.allclose(alone.pooled[0], together.pooled[0], atol=1e-5)


def test_words_and_their_order_matter(encoder: ByteEncoder) -> None:
    cond = encoder(["red star blue", "blue star red", "red star blues"])
    assert not torch.allclose(cond.text[0], cond.text[1], atol=1e-3)
    assert not torch.allclose(cond.text[0, 2], cond.text[2, 2], atol=1e-3)


def test_at_first_a_word_sees_its_neighbours_and_no_others(encoder: ByteEncoder) -> None:
    # The blocks start as identities, so what reaches a word is what the convolution over five words brings.
    one, other = encoder(["red star above blue circle", "green star above blue circle"]).text
    changed = (one - other).abs().amax(1) > 1e-5
    assert changed.tolist() == [True, True, True, False, False]


def test_any_text_has_tokens(encoder: ByteEncoder) -> None:
    cond = encoder(["звезда", "☃ 星", "extraordinarily"])
    assert cond.mask.sum(1).tolist() == [1, 2, 2]  # fifteen bytes make two tokens of at most twelve


def test_too_long_a_prompt_is_cut_with_a_warning(encoder: ByteEncoder) -> None:
    with pytest.warns(UserWarning, match="cut from 9 to 8 words"):
        assert encoder(["one two three four five six seven eight nine"]).mask.sum() == 8
