"""Preference pairs in Parquet: who wins, what is left out, that pictures are read when they are asked for, and a run."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from folders import SIDE
from pyarrow import parquet as pq
from tables import picture

from mezzotint.cli import main
from mezzotint.data.batch import Stored
from mezzotint.data.decode import square
from mezzotint.data.mixture import found
from mezzotint.data.pair_shards import NEAR, NearStream, PairShards
from mezzotint.data.preferences import PreferencesConfig, is_preferences
from mezzotint.errors import UserError
from mezzotint.recipes import RECIPES
from mezzotint.train.log import read

Row = dict[str, Any]
SCHEMA = pa.schema(
    [("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()), ("caption", pa.string())]
)


def rows(count: int, captions: int = 0) -> list[Row]:
    """Row k has the pictures of the seeds 2k and 2k + 1; the second wins where k is odd. So many captions; 0: each has its own."""
    return [
        {
            "jpg_0": picture(2 * k, kind="JPEG"),
            "jpg_1": picture(2 * k + 1),
            "label_0": float(k % 2 == 0),
            "label_1": float(k % 2),
            "caption": f"thing {k % (captions or count)}",
        }
        for k in range(count)
    ]


def write(folder: Path, listed: list[Row], name: str = "train-0.parquet", group: int = 3) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(listed, schema=SCHEMA), folder / name, row_group_size=group)
    return folder


def build(folder: Path, held_out: float = 0.3, max_bad: float = 0.0, seed: int = 0) -> PairShards:
    source = PreferencesConfig(str(folder), SIDE, held_out, max_bad, seed).build()
    assert isinstance(source, PairShards)
    return source


def test_winners_are_those_with_the_greater_label(tmp_path: Path) -> None:
    listed = rows(8)
    source = build(write(write(tmp_path, listed[:5], "data/a.parquet"), listed[5:], "data/b.parquet"))
    assert isinstance(source, Stored)
    stored, batch, held_out = source.read(0, 8), source.batch(0, 8), source.held_out(99)
    assert {*batch.ids, *held_out.ids} == {f"data/a.parquet:{k}" for k in range(5)} | {f"data/b.parquet:{k}" for k in range(3)}
    assert stored.rejected is not None
    for k, name in enumerate(stored.ids):
        shard, _, number = name.partition(":")
        row = int(number) + 5 * (shard == "data/b.parquet")
        winner, loser = (torch.from_numpy(square(listed[row][f"jpg_{side}"], SIDE)) for side in (row % 2, 1 - row % 2))
        assert torch.equal(stored.images[k], winner)
        assert torch.equal(stored.rejected[k], loser)
        assert stored.prompts[k] == f"thing {row}"
    assert torch.allclose(batch.images, stored.images / 127.5 - 1, atol=1e-6)


def test_the_stream_has_every_pair_once_an_epoch_and_neighbours_of_few_groups(tmp_path: Path) -> None:
    source, other = build(write(tmp_path, rows(40), group=2)), build(tmp_path, seed=1)
    n = len(source)
    whole = source.batch(0, 3 * n).ids
    assert whole == [name for number in range(n) for name in source.batch(number, 3).ids]
    assert all(Counter(whole[k * n : (k + 1) * n]) == Counter(set(whole)) for k in range(3))
    assert other.batch(0, n).ids != whole[:n] != whole[n : 2 * n]
    assert other.held_out(99).ids == source.held_out(99).ids
    groups = torch.arange(1000) // 10
    drawn = groups[NearStream(torch.arange(1000), groups, "0").at(torch.arange(1000))]
    parts = [set(part.tolist()) for part in drawn.split(10 * NEAR)]
    assert all(len(part) == NEAR for part in parts), "of few groups"
    assert len(set(drawn[:8].tolist())) > 1, "and yet shuffled"


def test_pairs_of_a_caption_are_on_one_side(tmp_path: Path) -> None:
    source = build(write(tmp_path, rows(30, captions=10)))
    trained, held_out = source.batch(0, len(source)), source.held_out(99)
    assert not set(trained.prompts) & set(held_out.prompts)
    assert len(set(trained.ids) | set(held_out.ids)) == 30
    alike = build(write(tmp_path / "alike", rows(12, captions=1)))
    assert 0 < len(alike) < 12


def test_ties_and_missing_labels_are_left_out_and_listed(tmp_path: Path) -> None:
    listed = rows(9)
    listed[1] |= {"label_0": 0.5, "label_1": 0.5}
    listed[4] |= {"label_0": 0.5, "label_1": 0.5}
    source = build(write(tmp_path, listed))
    assert [(bad.file, bad.reason) for bad in source.bad] == [(f"train-0.parquet:{k}", "a tie: both labels are 0.5") for k in (1, 4)]
    assert len(source) + len(source.held_out(99)) == 7
    assert "2 set aside" in source.report()
    listed[5]["label_1"] = None
    write(tmp_path, listed)
    assert [bad.reason for bad in build(tmp_path, max_bad=0.2).bad if bad.file == "train-0.parquet:5"] == [
        "unreadable row: a label is missing"
    ]
    with pytest.raises(UserError, match=r"1 of 7 files and rows .* a label is missing"):
        build(tmp_path, max_bad=0.1)


def test_pictures_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, list[str]]] = []
    real = pq.ParquetFile.read_row_group

    def watched(self: pq.ParquetFile, number: int, columns: list[str]) -> pa.Table:
        seen.append((number, columns))
        return real(self, number, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    source = build(write(tmp_path, rows(60), group=2))
    assert not [columns for _, columns in seen if "jpg_0" in columns]
    seen.clear()
    source.batch(0, 1)
    assert [columns for _, columns in seen] == [["jpg_0", "jpg_1"]]
    source.batch(0, 2 * len(source))
    assert len(source._files) == 2 * NEAR, "no more stay in memory"
    first = source.held_out(4)
    seen.clear()
    assert source.held_out(4).ids == first.ids
    assert not seen


def test_what_cannot_be_decoded_is_replaced_and_listed(tmp_path: Path) -> None:
    listed = rows(12)
    sound = build(write(tmp_path, listed))
    name = sound.batch(0, 1).ids[0]
    number = int(name.partition(":")[2])
    listed[number]["jpg_1"] = listed[number]["jpg_1"][:60]
    broken = build(write(tmp_path, listed), max_bad=0.1)
    assert not broken.bad, "nobody has looked yet"
    after = sound.training[(sound.training > number).nonzero().flatten()[:1]]
    expected = f"train-0.parquet:{int(after) if len(after) else int(sound.training[0])}"
    assert broken.batch(0, 1).ids == [expected]
    assert broken.batch(0, 1).ids == [expected]
    assert [(bad.file, bad.reason.split(":")[:2]) for bad in broken.bad] == [(name, ["unusable picture", " jpg_1"])]
    with pytest.raises(UserError, match=r"1 of 12 pairs .* with max_bad of 0.0833 or more"):
        build(tmp_path).batch(0, 1)


def test_shards_that_are_none(tmp_path: Path) -> None:
    write(tmp_path, rows(6))
    (tmp_path / "train-1.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes()[:-50])
    (tmp_path / "readme.md").write_text("of no account")
    assert [bad.file for bad in build(tmp_path, max_bad=0.2).bad] == ["train-1.parquet"]
    with pytest.raises(UserError, match="damaged table"):
        build(tmp_path)
    pq.write_table(pa.table({"jpg_0": ["a"], "caption": ["b"]}), tmp_path / "train-1.parquet")
    with pytest.raises(UserError, match=r"column 'jpg_0' of 'train-1.parquet' is string"):
        build(tmp_path)
    pq.write_table(pa.table({"caption": ["b"]}), tmp_path / "train-1.parquet")
    with pytest.raises(UserError, match="has no column 'jpg_0'; shards of pairs have jpg_0, jpg_1, label_0, label_1, caption"):
        build(tmp_path)
    with pytest.raises(UserError, match="has 1 usable pairs; give two or more"):
        build(write(tmp_path / "one", rows(1)))
    (tmp_path / "train-1.parquet").unlink()
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(UserError, match="has 0 usable pairs"):
        PreferencesConfig(str(tmp_path)).build()  # a list comes first


def test_what_a_folder_holds_is_told_by_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b""], "caption": [""]}), tmp_path / "images.parquet")
    assert not is_preferences(tmp_path)
    assert not is_preferences(tmp_path / "nowhere")
    assert is_preferences(write(tmp_path / "pairs", rows(2), "data/train-0.parquet"))
    assert isinstance(found([str(tmp_path / "pairs")], SIDE), PreferencesConfig)


def test_the_version_is_that_of_labels_and_captions(tmp_path: Path) -> None:
    listed = rows(6)
    versions = [build(write(tmp_path, listed)).version, build(tmp_path, seed=1).version]
    listed[2] |= {"label_0": 0.0, "label_1": 1.0}
    versions.append(build(write(tmp_path, listed)).version)
    assert versions[0] == versions[1] != versions[2]


def test_a_run_trains_on_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = rows(9)
    listed[0] |= {"label_0": 0.5, "label_1": 0.5}
    write(tmp_path / "pairs", listed)
    RECIPES["tiny.dpo"]("xs").pipeline.build().save(tmp_path / "start")
    words = [
        "train",
        "tiny.dpo",
        "--size",
        "xs",
        "--init",
        str(tmp_path / "start"),
        "--data",
        str(tmp_path / "pairs"),
        "--out",
        str(tmp_path / "run"),
    ]
    few = ["--train.steps", "2", "--train.batch", "4", "--train.log", "1", "--train.preview", "9", "--data.held-out", "0.3"]
    assert main([*words, *few]) == 0
    assert "8 preference pairs" in capsys.readouterr().err
    assert [line["step"] for line in read(tmp_path / "run" / "metrics.jsonl") if "accuracy" in line] == [1, 2]
    assert json.loads((tmp_path / "run" / "set-aside.jsonl").read_text())["reason"] == "a tie: both labels are 0.5"
