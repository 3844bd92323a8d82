"""Buckets: shapes near the area, the nearest aspect, and an order of batches that is a function of the position and drops no picture."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.data.buckets import ASPECTS, SPREAD, Order, assign, batch_size, shape, shapes

SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
FEW = settings(deadline=None, max_examples=25)
CELLS = st.sampled_from([8, 16, 32, 64])


def log_aspect(size: tuple[int, int]) -> float:
    return math.log(size[0] / size[1])


@FEW
@given(side=st.integers(8, 32), multiple=CELLS, aspect=st.floats(0.3, 3.0))
def test_a_shape_has_the_area_and_the_aspect_up_to_rounding(side: int, multiple: int, aspect: float) -> None:
    side *= multiple
    width, height = shape(side, aspect, multiple)
    assert width % multiple == height % multiple == 0
    assert abs(width - side * math.sqrt(aspect)) <= multiple / 2
    assert abs(height - side / math.sqrt(aspect)) <= multiple / 2


@FEW
@given(side=st.integers(4, 64), multiple=CELLS)
def test_buckets_are_near_the_area_and_come_upright_and_lying(side: int, multiple: int) -> None:
    found = shapes(side * multiple, multiple)
    assert len(set(found)) == len(found)
    assert {(h, w) for w, h in found} == set(found)
    assert (side * multiple, side * multiple) in found
    assert all(abs(w * h / (side * multiple) ** 2 - 1) <= SPREAD for w, h in found)


def test_the_usual_buckets() -> None:
    assert shapes(1024, 64, (1.0, 16 / 9, 9 / 16)) == [(768, 1344), (1024, 1024), (1344, 768)]
    assert len(shapes(1024, 16)) == len(ASPECTS)
    with pytest.raises(ValueError, match="no shape has an area within 10% of 100 x 100"):
        shapes(100, 64)
    with pytest.raises(ValueError, match="aspect must be above 0"):
        shape(64, 0.0, 8)


@FEW
@given(sizes=st.lists(SIZES, min_size=1, max_size=20), multiple=CELLS)
def test_a_picture_goes_to_the_nearest_aspect(sizes: list[tuple[int, int]], multiple: int) -> None:
    buckets = shapes(8 * multiple, multiple)
    for size, number in zip(sizes, assign(sizes, buckets).tolist(), strict=True):
        distances = [abs(log_aspect(size) - log_aspect(bucket)) for bucket in buckets]
        assert distances[number] == pytest.approx(min(distances), abs=1e-9)


@FEW
@given(tokens=st.integers(1, 5000), bucket=st.sampled_from(shapes(512, 16)))
def test_a_batch_has_as_many_pictures_as_the_tokens_allow(tokens: int, bucket: tuple[int, int]) -> None:
    each = bucket[0] * bucket[1] // 256
    number = batch_size(bucket, 16, tokens)
    assert number == 1 or number * each <= tokens
    assert (number + 1) * each > tokens


def test_tokens_of_batches_are_nearly_constant() -> None:
    tokens = [batch_size(size, 16, 65_536) * size[0] * size[1] // 256 for size in shapes(512, 16)]
    assert min(tokens) > 0.98 * 65_536
    assert max(tokens) <= 65_536


@st.composite
def orders(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], int]:
    batch_sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    assigned = draw(st.lists(st.integers(0, len(batch_sizes) - 1), min_size=1, max_size=60))
    return torch.tensor(assigned), batch_sizes, draw(st.integers(0, 3))


@FEW
@given(orders())
def test_every_picture_comes_once_an_epoch_in_batches_of_one_bucket(case: tuple[torch.Tensor, list[int], int]) -> None:
    assigned, batch_sizes, seed = case
    order = Order(assigned, batch_sizes, seed)
    streams: dict[int, list[int]] = {bucket: [] for bucket in range(len(batch_sizes))}
    epochs = 4
    for number in range(sum(order.before(epochs))):
        batch = order.batch(number)
        assert len(batch.chosen) == batch_sizes[batch.bucket]
        assert (assigned[batch.chosen] == batch.bucket).all()
        streams[batch.bucket] += batch.chosen.tolist()
        counts = Counter(streams[batch.bucket])
        assert max(counts.values()) - min(counts[int(i)] for i in order.members[batch.bucket]) <= 1
    for bucket, stream in streams.items():
        members = order.members[bucket].tolist()
        # What an epoch leaves for the next one is less than a batch.
        assert 0 <= epochs * len(members) - len(stream) < batch_sizes[bucket]
        for time in range(len(stream) // max(1, len(members))):
            assert sorted(stream[time * len(members) : (time + 1) * len(members)]) == members


@FEW
@given(orders(), st.integers(0, 300))
def test_a_batch_is_a_function_of_its_number_and_the_seed(case: tuple[torch.Tensor, list[int], int], number: int) -> None:
    assigned, batch_sizes, seed = case
    here, there = Order(assigned, batch_sizes, seed), Order(assigned, batch_sizes, seed)
    for earlier in range(min(number, 20)):
        here.batch(earlier)
    assert here.batch(number).bucket == there.batch(number).bucket
    assert torch.equal(here.batch(number).chosen, there.batch(number).chosen)


def test_buckets_come_as_often_as_they_are_large_and_are_mixed() -> None:
    assigned = torch.tensor([0] * 600 + [1] * 200)
    order, other = Order(assigned, [4, 2]), Order(assigned, [4, 2], seed=1)
    batches = [order.batch(number) for number in range(250)]
    assert Counter(batch.bucket for batch in batches) == {0: 150, 1: 100}
    assert 40 < sum(batch.bucket for batch in batches[:125]) < 60
    assert [batch.bucket for batch in batches] != [other.batch(number).bucket for number in range(250)]
    assert not torch.equal(batches[0].chosen, order.batch(250).chosen), "another order in another epoch"
    assert batches[0].chosen.tolist() != sorted(batches[0].chosen.tolist())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="one for every bucket"):
        Order(torch.tensor([0, 2]), [4, 4])
    with pytest.raises(ValueError, match="batch_sizes must be at least 1"):
        Order(torch.tensor([0]), [0])
    with pytest.raises(ValueError, match="at least 1 pixel"):
        assign([(0, 4)], [(8, 8)])
