"""Verdicts: from which columns, in which order, and what a change of a threshold costs."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import dirty
import lance
import pyarrow as pa
import pytest

from mezzotint.curation import cuts
from mezzotint.curation.cuts import Curation, Cut, curate, funnel, judge
from mezzotint.curation.stage import Compute, Stage
from mezzotint.data import table as tables
from mezzotint.data.table import Table
from mezzotint.errors import UserError
from mezzotint.recipes.curation import clips, photos, pixels


def rows(**columns: list[Any]) -> Iterator[pa.RecordBatch]:
    count = len(next(iter(columns.values())))
    plain: dict[str, Any] = {"content": b"", "media": "image", "captions": [], "width": 1, "height": 1, "format": "PNG", "sha256": ""}
    plain |= {"source": "here", "fault": "", "url": None, "licence": None, "opt_out": None}
    data = [{"id": str(n), **plain, **{name: values[n] for name, values in columns.items()}} for n in range(count)]
    yield pa.RecordBatch.from_pylist(data, schema=tables.schema())


@pytest.fixture
def table(tmp_path: Path) -> Table:
    faults = ["", "", "not an image", "", "", ""]
    made = Table.create(tmp_path / "t.lance", rows(fault=faults, opt_out=[None, False, None, True, None, None]))
    columns = {
        "blur": pa.array([100.0, 12.345, 1.0, 1.0, None, 70.0], pa.float32()),
        "side": pa.array([300, 300, 300, 300, 300, 10], pa.int32()),
        "copy_of": pa.array([None, None, None, None, "0", None], pa.string()),
        "notes": pa.array([[], None, None, None, None, ["a url", "no words"]], pa.list_(pa.string())),
    }
    return made.with_columns(pa.table(columns), {"stage": "test"})


def verdicts(table: Table) -> list[str]:
    return table.read(["verdict"])["verdict"].to_pylist()  # type: ignore[no-any-return]


def test_the_first_reason_is_the_verdict_and_faults_come_first(table: Table) -> None:
    rules = [Cut("side", least=100, most=1000), Cut("blur", least=50), Cut("copy_of", empty=True), Cut("notes", empty=True)]
    judged = judge(table, rules)
    assert verdicts(judged) == ["", "blur 12.345 is below 50", "fault: not an image", "opt_out", "copy_of: 0", "side 10 is below 100"]
    assert funnel(judged) == {"fault": 1, "opt_out": 1, "side": 1, "blur": 1, "copy_of": 1, "notes": 0, "kept": 1}
    assert verdicts(judge(judged, rules[-1:]))[-1] == "notes: a url, no words"
    assert verdicts(judge(judged.latest, [Cut("blur", most=60)]))[0] == "blur 100 is above 60"


def test_bounds_belong_to_what_is_kept(table: Table) -> None:
    assert verdicts(judge(table, [Cut("side", least=300, most=300)]))[:2] == ["", ""]


def test_other_thresholds_make_other_verdicts_and_the_same_ones_nothing(table: Table) -> None:
    first = judge(table, [Cut("blur", least=50)])
    assert judge(first, [Cut("blur", least=50)]).version == first.version
    second = judge(first, [Cut("blur", least=90)])
    assert verdicts(second)[-1] == "blur 70 is below 90"
    assert second.stamp("verdict")["cuts"][-1]["least"] == 90.0  # type: ignore[index]


def test_what_was_not_computed_is_no_reason_if_the_cut_is_optional(table: Table) -> None:
    judged = judge(table, [Cut("nsfw", most=0.5, optional=True)])
    assert judged.stamp("verdict")["without"] == ["decode_fault", "clip_fault", "nsfw"]  # type: ignore[index]
    with pytest.raises(UserError, match="did you mean 'blur'"):
        judge(table, [Cut("blurr", least=1)])


def test_rows_that_came_after_the_verdict_want_a_new_one(table: Table) -> None:
    judged = judge(table, []).append(rows(fault=[""]))
    with pytest.raises(UserError, match="have no verdict"):
        funnel(judged)
    assert funnel(judge(judged, []))["kept"] == 5


def test_a_cut_says_one_thing() -> None:
    with pytest.raises(ValueError, match="least, most or both, or else be empty"):
        Cut("blur")
    with pytest.raises(ValueError, match="'blur'"):
        Cut("blur", least=1, empty=True)


@dataclass
class Absent(Stage, kind="test absent"):
    """A stage whose package nobody has."""

    reads: ClassVar[tuple[str, ...]] = ("content",)
    needs: ClassVar[tuple[str, ...]] = ("no_such_package",)
    extra: ClassVar[str] = "filters"

    @property
    def writes(self) -> pa.Schema:
        return pa.schema([pa.field("nothing", pa.int64())])

    def open(self) -> Compute:
        raise AssertionError


def test_a_stage_without_its_package_is_skipped_only_if_the_recipe_says_so(table: Table) -> None:
    recipe = Curation(stages=(), optional=(Absent(),), cuts=(Cut("nothing", least=1, optional=True),))
    assert recipe.skipped() == ["stage 'test absent' needs no_such_package; install with: pip install 'mezzotint[filters]'"]
    assert funnel(curate(table, recipe))["kept"] == 4
    with pytest.raises(UserError, match="pip install"):
        curate(table, Curation(stages=(Absent(),), cuts=()))


def test_recipes_are_stored_and_read_back() -> None:
    for recipe in (photos(), pixels(), clips()):
        assert Curation.from_data(recipe.to_data()) == recipe


def expected(samples: list[dirty.Sample], kinds: dict[str, str]) -> dict[str, str]:
    return {sample.id: kinds[sample.dirt] for sample in samples}


def test_dirt_is_told_by_its_kind_and_clean_pictures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 16)
    kinds = {"": "kept", "blur": "sharpness", "flat": "entropy", "tiny": "short_side", "narrow": "aspect", "truncated": "decode_fault"}
    kinds |= {"flipped": "decode_fault", "text": "text_area"}
    samples = dirty.dirty(dirty.photos(6, seed=20), 2, kinds=[kind for kind in kinds if kind])
    recipe = photos()
    recipe.optional = recipe.optional[:1]
    seen: set[str] = set()
    table = Table.create(tmp_path / "t.lance", dirty.rows(samples))
    judged = curate(table, recipe, workers=1, progress=lambda kind, done, total: seen.add(kind))
    found = judged.read(["id", "verdict"]).to_pylist()
    assert {row["id"]: cuts.rule(row["verdict"]) for row in found} == expected(samples, kinds)
    assert seen == {"caption faults", "probe", "overlay", "duplicates"}
    assert funnel(judged)["kept"] == 6


def test_worker_processes_make_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 4)
    samples = dirty.dirty(dirty.worlds(4, size=64), 1, kinds=["blur", "flat", "tiny", "truncated"])
    made = []
    for workers in (1, 2):
        table = curate(Table.create(tmp_path / f"{workers}.lance", dirty.rows(samples)), pixels(), workers=workers)
        made.append(table.read([name for name in table.columns if name != "content"]))
    assert made[0].equals(made[1])
    assert len(set(made[0]["verdict"].to_pylist())) > 3


class KilledError(BaseException):
    """Where a process would have ended."""


def both_recipes(place: Path) -> pa.Table:
    """What a table comes to under one recipe, and then under another, which replaces verdicts."""
    other = pixels()
    other.cuts = (Cut("short_side", least=65), *other.cuts[1:])
    for recipe in (pixels(), other):
        table = curate(Table.open(place), recipe, workers=1)
    return table.read([name for name in table.columns if name != "content"])


def test_a_run_that_ends_at_any_change_of_the_table_goes_on_to_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = dirty.dirty(dirty.worlds(3, size=64), 1, kinds=["tiny", "exact"])
    whole = Table.create(tmp_path / "whole.lance", dirty.rows(samples))
    left, after, changes = 1000, False, 0

    def ending(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*values: Any, **named: Any) -> Any:
            nonlocal left, changes
            left, changes = left - 1, changes + 1
            if not left and not after:
                raise KilledError
            result = change(*values, **named)
            if not left:
                raise KilledError
            return result

        return counted

    for name in ("add_columns", "drop_columns", "commit"):
        monkeypatch.setattr(lance.LanceDataset, name, ending(getattr(lance.LanceDataset, name)))
    shutil.copytree(whole.path, tmp_path / "sound.lance")
    expected = both_recipes(tmp_path / "sound.lance")
    for number in range(1, changes + 1):
        place = tmp_path / f"{number}.lance"
        shutil.copytree(whole.path, place)
        left, after = number, number % 2 == 0
        with pytest.raises(KilledError):
            both_recipes(place)
        assert both_recipes(place).equals(expected)
