"""Properties of several sources as one: shares, the stream, the split, what a run stores of it, and stages that shift the shares."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from elastic import step
from tables import batches, create, damaged, picture, row

from mezzotint.cli import main
from mezzotint.config import Config
from mezzotint.data.batch import Batch, Source
from mezzotint.data.mixture import Mixture, MixtureConfig
from mezzotint.data.rows import TableConfig
from mezzotint.data.table import Table
from mezzotint.data.worlds import WorldsConfig
from mezzotint.errors import UserError
from mezzotint.train.log import read
from mezzotint.train.stages import changed
from mezzotint.train.trainer import RunConfig

SHAPES = ((12, 8), (8, 8), (8, 12))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tables of pictures of three shapes; five are in both."""
    folder = tmp_path_factory.mktemp("tables")
    seeds = {"one": range(20), "two": range(15, 45)}
    return [
        create(folder / f"{name}.lance", (row(f"{seed:02}", picture(seed, *SHAPES[seed % 3])) for seed in seeds[name])).path
        for name in seeds
    ]


def build(tables: list[Path], weights: tuple[float, ...] = (1.0, 3.0), **fields: object) -> Mixture:
    parts = {path.stem: TableConfig(str(path), held_out=0.2).replace(**fields) for path in tables}
    return MixtureConfig(parts, dict(zip(parts, weights, strict=True)), size=8).build()  # type: ignore[arg-type]


def part(name: str) -> str:
    return name.split("/")[0]


def equal(one: Batch, other: Batch) -> bool:
    return one.ids == other.ids and one.prompts == other.prompts and torch.equal(one.images, other.images)


def test_parts_have_exactly_their_shares_and_their_rows_come_equally_often(tables: list[Path]) -> None:
    source = build(tables)
    for block in range(2):
        assert Counter(map(part, source.batch(block, 1024).ids)) == {"one": 256, "two": 768}
    stream = [name for number in range(2) for name in source.batch(number, 500).ids]
    for name, rows in source.sources.items():
        counts = Counter(each for each in stream if part(each) == name)
        assert len(counts) == len(rows)  # type: ignore[arg-type]
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("fields", [{"flip": True, "crop": "random"}, {"flip": True, "multiple": 4}], ids=["samples", "batches"])
def test_a_batch_is_a_function_of_its_number_and_size(tables: list[Path], fields: dict[str, object]) -> None:
    forwards = [build(tables, **fields).batch(number, 5) for number in range(6)]
    again = build(tables, **fields)
    assert all(equal(forwards[number], again.batch(number, 5)) for number in (4, 0, 5, 2, 4))
    assert len({part(name) for batch in forwards for name in batch.ids}) == 2
    if "multiple" in fields:
        assert all(len(set(map(part, batch.ids))) == 1 for batch in forwards)
    else:
        whole = again.batch(0, 30)
        assert whole.ids == [name for batch in forwards for name in batch.ids]
        assert torch.equal(whole.images, torch.cat([batch.images for batch in forwards]))


def test_a_resumed_run_of_other_ranks_sees_the_same_batches(tables: list[Path]) -> None:
    """Four micro-batches a step, by one rank, then by two, then by four, stopped at any step; every row comes once an epoch of its part."""

    def made() -> Source:
        return build(tables, flip=True)

    assert step(made, 1, 1) == step(made, 1, 2) == step(made, 1, 4)
    elastic = [name.split()[0] for position, ranks in enumerate((1, 2, 2, 4, 1)) for name in step(made, position, ranks)]
    source = build(tables)
    assert elastic == source.batch(0, 60).ids
    for name, rows in source.sources.items():
        own = [each for each in elastic if part(each) == name]
        first = own[: len(rows)]  # type: ignore[arg-type]
        assert len(set(first)) == len(first)


def test_what_both_tables_have_falls_on_one_side(tmp_path: Path) -> None:
    paths = [
        create(tmp_path / f"{name}.lance", [row(f"{seed}", picture(seed, 8, 8)) for seed in seeds]).path
        for name, seeds in {"one": range(200), "two": range(100, 300)}.items()
    ]
    source = build(paths, (1.0, 1.0))
    sides = [{name.split("/")[1] for batch in found for name in batch.ids} for found in ([source.batch(0, 400)], [source.held_out(400)])]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"{seed}" for seed in range(300)}
    assert Counter(map(part, source.held_out(20).ids)).keys() == {"one", "two"}


@pytest.mark.filterwarnings("ignore:.*is set aside")
def test_worlds_are_a_part_and_what_is_set_aside_names_its_own(tmp_path: Path) -> None:
    rows = [damaged(f"{seed}", seed) if seed == 4 else row(f"{seed}", picture(seed)) for seed in range(9)]
    parts = {"table": TableConfig(str(create(tmp_path / "t.lance", rows).path), max_bad=0.5), "worlds": WorldsConfig()}
    source = MixtureConfig(parts, {"table": 1.0, "worlds": 1.0}, size=16).build()  # type: ignore[arg-type]
    batch = source.batch(0, 40)
    assert batch.images.shape == (40, 3, 16, 16)
    assert batch.images.abs().max() <= 1
    assert [bad.file for bad in source.bad] == ["table/4"]
    assert {part(name) for name in batch.ids} == {"table", "worlds"}
    assert "50.0% worlds" in source.report()


def test_settings_are_stored_and_checked(tables: list[Path]) -> None:
    config = build(tables).config
    assert Config.from_data(json.loads(json.dumps(config.to_data()))) == config
    for changes, message in (
        ({"weights": {"one": 1.0}}, "a weight for each of its parts"),
        ({"weights": {"one": 1.0, "two": 0.0}}, "weights above 0"),
        ({"weights": {"one": 1.0, "two": 1e-5}}, "1/1024"),
        ({"parts": {**config.parts, "two": replace(config.parts["two"], states="states")}}, "by all parts of a mixture or by none"),
    ):
        with pytest.raises(UserError, match=message):
            config.replace(**changes).build()


def test_a_stage_changes_the_weight_of_a_part_and_names_the_nearest(tables: list[Path]) -> None:
    run = RunConfig(data=build(tables).config)
    later = changed(run, {"data.weights.two": 9, "data.parts.one.flip": True})
    assert isinstance(later.data, MixtureConfig)
    assert later.data.weights == {"one": 1.0, "two": 9.0}
    assert later.data.parts["one"] == TableConfig(str(tables[0]), held_out=0.2, flip=True)
    assert run.data == build(tables).config
    with pytest.raises(UserError, match=r"did you mean 'data.weights.two'"):
        changed(run, {"data.weights.tow": 9})


def test_a_run_on_tables_that_grow_meanwhile_is_the_same_run(
    tables: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [Path(shutil.copytree(path, tmp_path / path.name)) for path in tables]
    words = ["train", "tiny.images", "--size", "xs", "--data", str(places[0]), "--data", f"rest={places[1]}"]
    words += ["--data.parts.rest.where", "id > '20'", "--data.weights.rest", "3", "--train.batch", "4", "--train.steps", "4"]
    words += ["--stages.0.steps", "2", "--stages.0.data.weights.one", "9", "--stages.0.data.size", "16"]
    words += ["--train.log", "1", "--train.checkpoint", "2", "--train.held-out", "2"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert "75.0% rest: 24 of 30 rows" in capsys.readouterr().err
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())["data"]["parts"]
    assert {name: found["version"] for name, found in stored.items()} == {"one": "1", "rest": "1"}
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step-00000004")
    Table.open(places[1]).append(batches([row(f"{seed}", picture(seed)) for seed in range(60, 80)]))
    assert main([*words, "--out", str(tmp_path / "halves")]) == 0
    losses = [[line["loss"] for line in read(tmp_path / run / "metrics.jsonl") if "loss" in line] for run in ("whole", "halves")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert main(["train", "tiny.images", "--data", str(places[0]), "--data", str(tables[0]), "--out", str(tmp_path / "x")]) == 2
    assert "two of the data are called 'one'" in capsys.readouterr().err
