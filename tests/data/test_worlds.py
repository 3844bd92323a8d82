"""Worlds as a source of batches."""

import torch

from mezzotint.data.worlds import WorldsConfig
from mezzotint.worlds import judge
from mezzotint.worlds.caption import parse
from mezzotint.worlds.scene import Description


def test_a_batch_is_a_function_of_its_number() -> None:
    first, again = WorldsConfig().build().batch(3, 8), WorldsConfig().build().batch(3, 8)
    assert torch.equal(first.images, again.images)
    assert first.prompts == again.prompts
    other = WorldsConfig().build().batch(4, 8)
    assert first.prompts != other.prompts
    assert WorldsConfig(seed=1).build().batch(3, 8).prompts != first.prompts


def test_a_sample_does_not_depend_on_the_size_of_its_batch() -> None:
    small, large = WorldsConfig().build().batch(3, 4), WorldsConfig().build().batch(3, 8)
    assert torch.equal(small.images, large.images[:4])
    assert small.prompts == large.prompts[:4]


def test_held_out_samples_are_not_in_training() -> None:
    source = WorldsConfig().build()
    held = set(source.held_out(32).ids)
    assert not any(held & set(source.batch(k, 32).ids) for k in range(20))


def test_every_fifth_batch_tells_everything() -> None:
    source = WorldsConfig(long_every=5).build()
    for number in range(10):
        descriptions: list[Description] = [parse(p) for p in source.batch(number, 4).prompts]
        assert all((d.style is not None) == (number % 5 == 4) for d in descriptions)


def test_captions_of_pairs_are_true_of_both_pictures() -> None:
    for number in range(10):
        assert all(parse(p).style is None for p in WorldsConfig(pairs=True).build().batch(number, 8).prompts)


def test_mistaken_captions_are_of_other_scenes() -> None:
    honest, mixed = (WorldsConfig(mistaken=share).build().batch(0, 200) for share in (0.0, 0.5))
    assert torch.equal(honest.images, mixed.images)
    same = [a == b for a, b in zip(honest.prompts, mixed.prompts, strict=True)]
    right = judge.score(mixed.images, mixed.prompts)
    assert 80 <= sum(same) <= 120
    assert right[torch.tensor(same)].mean() > 0.97
    assert right[~torch.tensor(same)].mean() < 0.1
