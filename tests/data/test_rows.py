"""Properties of a table as a source: the stream, the split, captions, parts, buckets, rows that cannot be decoded, and versions."""

import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from elastic import step
from tables import batches, create, damaged, picture, row

from mezzotint.cli import main
from mezzotint.config import Config
from mezzotint.data.batch import Batch, Loader, Source
from mezzotint.data.rows import Rows, TableConfig
from mezzotint.data.table import Table
from mezzotint.errors import UserError
from mezzotint.train.log import read

ROWS = 30
SHAPES = ((12, 8), (8, 8), (8, 12))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of pictures of three shapes from two sources, with another column of captions."""
    path = tmp_path_factory.mktemp("tables") / "t.lance"
    sources = {0: "near", 1: "far"}
    table = create(path, (row(f"{seed:02}", picture(seed, *SHAPES[seed % 3]), source=sources[seed % 5 == 0]) for seed in range(ROWS)))
    short = [f"{seed:02} short" if seed != 3 else None for seed in range(ROWS)]
    table.with_columns(pa.table({"short": short}), {"stage": "test"})
    return path


def build(place: Path, **fields: object) -> Rows:
    return TableConfig(str(place), size=8, held_out=0.2, max_bad=0.5).replace(**fields).build()


def equal(one: Batch, other: Batch) -> bool:
    return one.ids == other.ids and one.prompts == other.prompts and torch.equal(one.images, other.images)


VARIED = {"flip": True, "crop": "random", "captions": {"captions": 1.0, "short": 1.0}}
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "varied": VARIED,
    "buckets": {**VARIED, "multiple": 4},
}

# The stream.


def test_every_row_comes_exactly_once_an_epoch_across_batches_and_streams(place: Path) -> None:
    source = build(place)
    size, streams = 4, 3
    loaders = [Loader(source, size, stream, streams) for stream in range(streams)]
    stream = [name for _ in range(len(source)) for loader in loaders for name in next(loader).ids]
    epochs = [stream[i : i + len(source)] for i in range(0, len(stream), len(source))]
    assert len(epochs) == size * streams
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == len(source) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert not set(epochs[0]) & set(source.held_out(ROWS).ids)
    assert len(source) + len(source.held_out(ROWS)) == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_its_number_and_size(place: Path, kind: str) -> None:
    forwards = [build(place, **KINDS[kind]).batch(number, 5) for number in range(6)]
    again = build(place, **KINDS[kind])
    assert all(equal(forwards[number], again.batch(number, 5)) for number in (4, 0, 5, 2, 4))
    assert forwards[0].images.dtype == torch.float32
    assert forwards[0].images.abs().max() <= 1


def test_the_stream_does_not_depend_on_how_it_is_cut_into_batches(place: Path) -> None:
    source = build(place, **VARIED)
    whole, parts = source.batch(0, 60), [source.batch(number, 4) for number in range(15)]
    assert whole.ids == [name for part in parts for name in part.ids]
    assert whole.prompts == [prompt for part in parts for prompt in part.prompts]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_seeds_give_other_orders(place: Path) -> None:
    assert build(place, seed=1).batch(0, 10).ids != build(place, seed=2).batch(0, 10).ids


@pytest.mark.parametrize("kind", ["varied", "buckets"])
def test_reading_ahead_changes_nothing(place: Path, kind: str) -> None:
    source = build(place, workers=3, **KINDS[kind])
    expected = [build(place, **KINDS[kind]).batch(number, 3) for number in range(24)]
    loader = Loader(source, 3, streams=4)
    for position in (0, 1, 2, 1, 5, 0):  # as a run does that is rolled back, and one that leaves out batches
        for stream in (1, 2):  # the micro-batches of one rank
            loader.stream, loader.position = stream, position
            assert equal(next(loader), expected[position * 4 + stream])
    assert loader._ahead is not None
    assert len(loader._ahead.waiting) <= 2 * 3 * source.workers
    loader.batch_size = 2
    assert equal(next(loader), source.batch(loader.position * 4 - 2, 2))
    loader.close()


def test_a_resumed_run_of_other_ranks_sees_the_same_batches(place: Path) -> None:
    """Four micro-batches a step, by one rank, then by two, then by four, stopped in the middle of an epoch."""

    def made() -> Source:
        return build(place, **VARIED)

    assert step(made, 1, 1) == step(made, 1, 2) == step(made, 1, 4)


# Which rows.


def test_copies_fall_on_one_side_and_rows_that_come_later_move_none(tmp_path: Path) -> None:
    table = create(tmp_path / "t.lance", [row(f"{seed}", picture(seed)) for seed in range(40)])
    held_out = set(build(table.path, held_out=0.3).held_out(99).ids)
    copies = [row(f"copy {seed}", picture(seed)) for seed in range(40)]
    table.append(batches(copies + [row(f"{seed}", picture(seed)) for seed in range(40, 60)]))
    after = build(table.path, held_out=0.3, seed=3).held_out(99).ids
    assert {name for name in after if name.isdecimal() and int(name) < 40} == held_out
    assert {name.removeprefix("copy ") for name in after if name.startswith("copy")} == held_out
    assert 5 < len(held_out) < 20


def test_rows_with_something_against_them_are_left_out_and_counted(tmp_path: Path) -> None:
    kinds = [{}, {"fault": "empty file"}, {"media": "clip"}, {}, {}, {"source": "far"}, {"opt_out": True}]
    table = create(tmp_path / "t.lance", [row(f"{seed}", picture(seed), **kind) for seed, kind in enumerate(kinds)])
    table.with_columns(pa.table({"verdict": ["", "", "", "too small", None, "", ""]}), {"stage": "test"})
    source = build(table.path, where="source = 'here'")
    assert sorted(source.batch(0, len(source)).ids + source.held_out(9).ids) == ["0", "4"]
    assert "2 of 7 rows" in source.report()
    for why in ("a fault", "a verdict", "clips", "the owner opted out", "not source = 'here'"):
        assert f"1 left out: {why}" in source.report()
    with pytest.raises(UserError, match=r"no row of .* can be trained on"):
        build(table.path, where="source = 'nowhere'")
    with pytest.raises(UserError, match="is no condition on the rows"):
        build(table.path, where="nothing = 1")


def test_rows_come_as_often_as_they_repeat(tmp_path: Path) -> None:
    table = create(tmp_path / "t.lance", [row(f"{seed}", picture(seed)) for seed in range(9)])
    table.with_columns(pa.table({"repeats": pa.array([3, 1, None] * 3, pa.int32())}), {"stage": "test"})
    source = build(table.path)
    expected = {f"{seed}": (3, 1, 1)[seed % 3] for seed in range(9) if f"{seed}" not in source.held_out(9).ids}
    assert Counter(source.batch(1, len(source)).ids) == expected


def test_batches_of_buckets_have_one_shape_and_miss_no_row(place: Path) -> None:
    source = build(place, multiple=2)
    seen: Counter[str] = Counter()
    shapes = set()
    for number in range(60):
        batch = source.batch(number, 4)
        height, width = batch.images.shape[2:]
        assert height % 2 == width % 2 == 0
        assert abs(height * width / 64 - 1) < 0.11
        assert all((width > height, width < height) == (w > h, w < h) for w, h in (SHAPES[int(name) % 3] for name in batch.ids))
        seen.update(batch.ids)
        shapes.add((height, width))
    assert len(shapes) == 3
    assert len(seen) == len(source)
    assert max(seen.values()) <= 1.5 * min(seen.values())
    assert source.held_out(4).images.shape == (4, 3, 8, 8)


# Captions and cuts.


def test_captions_come_as_often_as_the_mix_says(place: Path) -> None:
    prompts = build(place, captions={"captions": 0.25, "short": 0.75}).batch(0, 2000).prompts
    counts = Counter("none" if prompt.startswith("03 ") else prompt.split()[1] for prompt in prompts)
    known = sum(counts.values()) - counts["none"]
    assert 0.7 < counts["short"] / known < 0.8
    assert 0.1 < counts["one"] / known < 0.15
    assert {prompt for prompt in prompts if prompt.startswith("03 ")} <= {"03 one", "03 two"}  # which has no short one
    assert all(prompt.endswith("short") for prompt in build(place, captions={"short": 1.0}, where="id != '03'").held_out(9).prompts)
    with pytest.raises(UserError, match="did you mean 'short'"):
        build(place, captions={"shor": 1.0})


def test_random_cuts_lie_everywhere_and_flips_are_half(place: Path) -> None:
    where = {"where": "id = '00' or id = '01'", "held_out": 0.0}  # of which one is held out; either is there
    plain, cut = (build(place, **where, crop=crop).batch(0, 60).images for crop in ("centre", "random"))
    assert len({tuple(image.flatten().tolist()) for image in plain}) == 1
    wide = build(place, **where).batch(0, 1).ids == ["00"]
    assert len({tuple(image.flatten().tolist()) for image in cut}) == (5 if wide else 1)
    flipped = build(place, **where, flip=True).batch(0, 400).images
    mirrored = sum(torch.equal(image, plain[0].flip(2)) for image in flipped)
    assert 150 < mirrored < 250
    assert sum(torch.equal(image, plain[0]) for image in flipped) == 400 - mirrored


# Rows that cannot be decoded.


@pytest.fixture
def worn(tmp_path: Path) -> Path:
    rows = [damaged(f"{seed}", seed) if seed in (4, 5, 11) else row(f"{seed}", picture(seed)) for seed in range(20)]
    return create(tmp_path / "t.lance", rows).path


@pytest.mark.filterwarnings("ignore:.*is set aside")
def test_rows_that_cannot_be_decoded_are_replaced_by_the_next_of_their_kind(worn: Path) -> None:
    source = build(worn)
    stream = [name for number in range(6) for name in source.batch(number, len(source)).ids]
    assert not {"4", "5", "11"} & set(stream)
    assert set(stream) | set(source.held_out(20).ids) == {f"{seed}" for seed in range(20)} - {"4", "5", "11"}
    assert sorted(bad.file for bad in source.bad) == ["11", "4", "5"]
    assert all(bad.reason.startswith("cannot be decoded") for bad in source.bad)
    late = build(worn)  # which meets them in another order
    assert [name for number in reversed(range(6)) for name in reversed(late.batch(number, len(source)).ids)] == stream[::-1]


@pytest.mark.filterwarnings("ignore:.*is set aside")
def test_too_many_of_them_end_the_run(worn: Path) -> None:
    source = build(worn, max_bad=0.1)
    with pytest.raises(UserError, match=r"3 of 20 rows .* filter the table, or go on without them with max_bad of 0.15") as error:
        source.batch(0, 40), source.held_out(20)
    assert "\n" not in str(error.value)


# Versions.


def test_a_run_goes_on_with_the_version_that_it_began_with(place: Path, tmp_path: Path) -> None:
    table = create(tmp_path / "t.lance", [row(f"{seed}", picture(seed)) for seed in range(10)])
    config = TableConfig(str(table.path), size=8)
    began = config.pinned(tmp_path)
    assert began.version == str(table.version)
    (tmp_path / "config.json").write_text(f'{{"data": {{"kind": "table", "version": "{began.version}"}}}}')
    before = began.build()
    grown = table.append(batches([row(f"{seed}", picture(seed)) for seed in range(10, 20)]))
    grown.snapshot("grown")
    again = config.pinned(tmp_path).build()
    assert again.version == before.version
    assert equal(again.batch(1, 7), before.batch(1, 7))
    for newer in (config, config.replace(version="grown"), config.replace(version=str(grown.version))):
        assert len(newer.build()) + len(newer.build().held_out(99)) == 20
        assert newer.build().version != before.version
    with pytest.raises(UserError, match="unknown version"):
        config.replace(version="ungrown").build()


def test_settings_are_stored_and_checked(place: Path) -> None:
    config = TableConfig(str(place), captions={"short": 1.0})
    assert Config.from_data(config.to_data()) == config
    assert config == replace(config, workers=7)
    for fields in ({"size": 0}, {"held_out": 1.0}, {"max_bad": -0.1}, {"latents": "short", "flip": True}, {"captions": {"short": 0.0}}):
        with pytest.raises(UserError):
            build(place, **fields)


def test_of_a_large_table_only_small_columns_are_read_at_the_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    whole = Table.read

    def watched(self: Table, columns: list[str]) -> pa.Table:
        seen.extend(columns)
        return whole(self, columns)

    monkeypatch.setattr(Table, "read", watched)
    build(place)
    assert set(seen) == {"sha256", "width", "height", "media", "opt_out", "repeats", "fault"}


def test_pictures_of_small_tables_stay_in_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(place, flip=True)
    first = source.batch(0, 2 * len(source))
    monkeypatch.setattr(Table, "take", None)
    assert equal(source.batch(0, 2 * len(source)), first)


def test_reading_and_training_go_on_together(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step takes its time, the next batches are read."""
    source = build(place, workers=2)
    quick = source.read

    def slow(number: int, size: int) -> Batch:
        time.sleep(0.05)
        return quick(number, size)

    monkeypatch.setattr(source, "read", slow)
    loader = Loader(source, 2)
    next(loader)
    time.sleep(0.5)
    before = loader.waited
    next(loader)
    assert loader.waited - before < 0.04
    loader.close()


# The command line.


@pytest.mark.filterwarnings("ignore:.*is set aside")
def test_a_run_on_a_table_that_grows_meanwhile_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [damaged(f"{seed}", seed) if seed == 4 else row(f"{seed}", picture(seed)) for seed in range(20)]
    table = create(tmp_path / "t.lance", rows)
    words = ["train", "tiny.images", "--size", "xs", "--data", str(table.path), "--data.max-bad", "0.1", "--data.captions", "captions", "1"]
    words += ["--train.batch", "4", "--train.steps", "4", "--train.accumulate", "2"]
    words += ["--train.log", "1", "--train.checkpoint", "2", "--train.held-out", "2"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert "20 of 20 rows" in capsys.readouterr().err
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    table.append(batches([row(f"{seed}", picture(seed)) for seed in range(20, 40)]))
    assert main([*words, "--out", str(tmp_path / "parts"), "--data.workers", "3"]) == 0
    losses = [[line["loss"] for line in read(tmp_path / run / "metrics.jsonl") if "loss" in line] for run in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    aside = [bad for line in read(tmp_path / "whole" / "metrics.jsonl") for bad in line.get("set_aside", [])]
    assert [bad["file"] for bad in aside] == ["4"]
    assert main([*words, "--out", str(tmp_path / "parts"), "--data.version", str(table.latest.version)]) == 2
    assert "data.version was" in capsys.readouterr().err
