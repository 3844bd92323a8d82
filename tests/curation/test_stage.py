"""A stage over a table: what it makes, what it leaves alone, and what a kill costs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from lance.fragment import LanceFragment

from mezzotint.curation.stage import Compute, Stage, done
from mezzotint.curation.stage import run as run_with
from mezzotint.data import table as tables
from mezzotint.data.table import Table
from mezzotint.errors import UserError


@dataclass
class Length(Stage, kind="test length"):
    """How many bytes a row has, times `factor`."""

    factor: int = 1
    pause: float = 0.0
    reads: ClassVar[tuple[str, ...]] = ("content",)

    @property
    def writes(self) -> pa.Schema:
        return pa.schema([pa.field("length", pa.int64())])

    def open(self) -> Compute:
        def compute(batch: pa.RecordBatch) -> pa.RecordBatch:
            time.sleep(self.pause)
            return pa.record_batch([pa.array([len(c) * self.factor for c in batch["content"].to_pylist()])], names=["length"])

        return compute


@dataclass
class Half(Stage, kind="test half"):
    """Half of what `Length` made."""

    reads: ClassVar[tuple[str, ...]] = ("length",)

    @property
    def writes(self) -> pa.Schema:
        return pa.schema([pa.field("half", pa.float64())])

    def open(self) -> Compute:
        return lambda batch: pa.record_batch([pa.array([n / 2 for n in batch["length"].to_pylist()])], names=["half"])


@dataclass
class Lacking(Length, kind="test lacking"):
    """A stage whose model is not there."""

    def open(self) -> Compute:
        raise UserError("there is no model; get one")


def rows(count: int, first: int = 0) -> Iterator[pa.RecordBatch]:
    names = [f"{i}" for i in range(first, first + count)]
    plain = {"media": "image", "captions": [], "width": 1, "height": 1, "format": "PNG", "sha256": "", "source": "here", "fault": ""}
    data = [{"id": name, "content": b"x" * int(name), "url": None, "licence": None, "opt_out": None, **plain} for name in names]
    yield pa.RecordBatch.from_pylist(data, schema=tables.schema())


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(tables, "ROWS", 8)
    return Table.create(tmp_path / "t.lance", rows(30))


run = partial(run_with, workers=1)  # in this process, where not said otherwise


def column(table: Table, name: str) -> list[float]:
    return table.read([name])[name].to_pylist()  # type: ignore[no-any-return]


def test_a_stage_adds_columns_and_touches_no_other_file(table: Table) -> None:
    before = {file: file.stat().st_mtime_ns for file in (table.path / "data").iterdir()}
    after = run(table, Length(factor=3))
    assert column(after, "length") == [3 * i for i in range(30)]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "length" not in Table.open(table.path, table.version).columns


def test_what_was_done_is_not_done_again_unless_it_would_differ(table: Table) -> None:
    first = run(table, Length())
    assert done(first, Length())
    assert run(first, Length()).version == first.version
    second = run(first, Length(factor=2))
    assert column(second, "length") == [2 * i for i in range(30)]
    assert not done(second, Length())


def test_columns_made_from_a_column_that_changed_are_due_again(table: Table) -> None:
    table = run(run(table, Length()), Half())
    assert done(table, Half())
    table = run(table, Length(factor=2))
    assert not done(table, Half())
    assert column(run(table, Half()), "half") == [float(i) for i in range(30)]


def test_rows_that_came_later_make_all_due_again(table: Table) -> None:
    table = run(table, Length()).append(rows(5, first=30))
    assert not done(table, Length())
    assert column(run(table, Length()), "length") == list(range(35))


def test_a_worker_process_makes_the_same_columns(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the worker finds `Length`
    here = column(run(table, Length()), "length")
    seen: list[int] = []
    again = run(run(table.latest, Length(factor=2)), Length(), workers=2, progress=lambda finished, total: seen.append(finished))
    assert column(again, "length") == here
    assert sorted(seen) == seen
    assert seen[-1] == 30


def test_a_mistake_in_a_worker_process_is_the_users_one_line(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(UserError, match="there is no model; get one"):
        run(table, Lacking(), workers=2)


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_stage import Length
from mezzotint.curation.stage import run
from mezzotint.data.table import Table
run(Table.open(sys.argv[1]), Length(pause=0.4), workers=1)
"""


def test_a_killed_run_goes_on_with_the_fragments_that_are_missing(table: Table) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(table.path), str(Path(__file__).parent)], env=dict(os.environ))
    while not (noted := list((table.path / tables.NOTES).glob("*/*.json"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "length" not in table.latest.columns
    seen: list[int] = []
    after = run(table.latest, Length(pause=0.4), progress=lambda finished, total: seen.append(finished))
    assert 0 < len(seen) <= 4 - len(noted)
    assert column(after, "length") == list(range(30))
    assert not list((table.path / tables.NOTES).glob("*/*.json"))


def test_a_full_disk_is_one_line_and_what_was_done_stays(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    write = LanceFragment.merge_columns

    def full(fragment: LanceFragment, *values: Any) -> Any:
        if fragment.fragment_id == 2:
            raise OSError("LanceError(IO): No space left on device (os error 28)")
        return write(fragment, *values)

    monkeypatch.setattr(LanceFragment, "merge_columns", full)
    with pytest.raises(UserError, match=r"no space left for '.*'; make room and give the same command again"):
        run(table, Length())
    monkeypatch.setattr(LanceFragment, "merge_columns", write)
    seen: list[int] = []
    after = run(table.latest, Length(), progress=lambda finished, total: seen.append(finished))
    assert seen == [24, 30]
    assert column(after, "length") == list(range(30))


GROWS = """
import re
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_stage import Length
from mezzotint.curation.stage import Worker
from mezzotint.data.table import Table
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
table = Table.open(sys.argv[1])
worker = Worker(str(table.path), table.version, Length())
before = most()
worker(0)
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
def test_memory_is_that_of_batches_and_not_of_a_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 128)
    whole = next(rows(128))
    contents = pa.array([os.urandom(1 << 20) for _ in range(128)], pa.large_binary())
    place = Table.create(tmp_path / "t.lance", [whole.set_column(1, whole.schema.field("content"), contents)]).path
    command = [sys.executable, "-c", GROWS, str(place), str(Path(__file__).parent)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 160  # MB: two batches of 16 as Lance and Python have them, and what is read ahead


def test_a_fragment_is_read_alone(table: Table) -> None:
    found = [[row for batch in table.batches(["id"], fragment=number) for row in batch["id"].to_pylist()] for number in table.fragments]
    assert found == [[str(k) for k in range(first, min(30, first + 8))] for first in range(0, 30, 8)]


def test_two_runs_do_not_meet_on_one_table(table: Table) -> None:
    with table.locked(), pytest.raises(UserError, match="another run is at work"), Table.open(table.path).locked():
        pass


def test_versions_are_found_by_number_and_by_name(table: Table) -> None:
    table.snapshot("raw")
    run(table, Length())
    assert "length" not in Table.open(table.path, "raw").columns
    with pytest.raises(UserError, match="did you mean 'raw'"):
        Table.open(table.path, "row")
