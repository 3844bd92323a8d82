"""Where it fits: every computation over a table is a stage, and this runs them: here, or on a Ray cluster.

In: a table, and a stage: a description that knows which columns it reads, which it writes, and how to get from a batch of the one to a
batch of the other. Out: the table with those columns, stamped with what made them.
How: Daft deals the table's fragments out to workers. Each writes the new columns of its fragment beside the old ones, and the
driver notes that in a journal; when all are there, one commit makes them visible. So nothing is half there, a killed run goes on with the
fragments that are missing, and memory is that of a batch or two for each worker.
"""

import ctypes
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mezzotint import config
from mezzotint.data.table import NOTES, Table, disk
from mezzotint.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Compute = Callable[["pa.RecordBatch"], "pa.RecordBatch"]
EngineName = Literal["native", "ray"]
Progress = Callable[[int, int], None]  # rows done, of how many
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Stage(config.Config, ABC, kind="curation stage"):
    """Columns from columns, row by row: no row of the result may depend on another row.

    reads: the columns it needs. rows: how many it gets at once, at most. revision: raised by whoever changes what the same settings
    compute. needs: modules that it imports beyond those of the data engine. extra: what installs them.
    """

    reads: ClassVar[tuple[str, ...]]
    rows: ClassVar[int] = 16
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "data"

    @property
    @abstractmethod
    def writes(self) -> "pa.Schema":
        """The columns that it adds, all of which may be null."""

    @abstractmethod
    def open(self) -> Compute:
        """The computation, once in each worker: models are loaded here. It must not raise for a bad row, but say so in a column."""

    @property
    def missing(self) -> str:
        """What has to be installed before the stage can run, as a sentence; "" if nothing."""
        absent = [name for name in self.needs if find_spec(name) is None]
        return f"stage {self.kind!r} needs {', '.join(absent)}; install with: pip install 'mezzotint[{self.extra}]'" if absent else ""

    @property
    def stamp(self) -> dict[str, Any]:
        """What is the same exactly if the columns would be."""
        return {"stage": self.to_data(), "revision": self.revision}


def done(table: Table, stage: Stage) -> bool:
    """Whether the table has what the stage would compute, from columns that are still those it was computed from."""
    made = [table.stamp(name) for name in stage.writes.names if name in table.columns]
    return len(made) == len(stage.writes.names) and all(stamp is not None and _plain(stamp) == _due(table, stage) for stamp in made)


def run(table: Table, stage: Stage, engine: EngineName = "native", workers: int = 2, progress: Progress | None = None) -> Table:
    """The table with the columns of a stage; as it was, where it has them already.

    workers: processes on this machine, or in the cluster. The caller holds the table's lock.
    """
    if done(table, stage):
        return table
    if stage.missing:
        raise UserError(stage.missing)
    table.check(stage.reads)
    table = table.without(stage.writes.names)
    if not len(table):
        return table.with_columns(stage.writes.empty_table(), _due(table, stage))
    journal = _Journal(table, stage)
    sizes = {number: int(fragment.count_rows()) for number, fragment in table.fragments.items()}
    todo = [number for number in sizes if number not in journal.parts]
    finished = sum(sizes[number] for number in journal.parts)
    for number, part in deal(Worker, (str(table.path), table.version, stage), todo, engine, workers):
        journal.note(number, part)
        finished += sizes[number]
        if progress:
            progress(finished, len(table))
    return journal.commit()


class Worker:
    """Computes the columns of one fragment at a time, and writes them. Made in the process that it works in."""

    def __init__(self, path: str, version: int, stage: Stage) -> None:
        _give_back()
        self.table, self.stage = Table.open(path, version), stage
        self.writes, self.compute = _stamped(self.table, stage), stage.open()
        self.failed: Exception | None = None

    def __call__(self, fragment: int) -> str:
        """The description of the fragment with the new columns, which no one sees before it is committed."""
        import pyarrow as pa

        rows = self.table.batches(self.stage.reads, self.stage.rows, fragment)
        reader = pa.RecordBatchReader.from_batches(self.writes, map(self._checked, rows))
        try:
            with disk(self.table.path):
                description, _ = self.table.fragments[fragment].merge_columns(reader)
        except Exception:
            if self.failed:
                raise self.failed from None
            raise
        return json.dumps(description.to_json())

    def _checked(self, batch: "pa.RecordBatch") -> "pa.RecordBatch":
        try:
            result = self.compute(batch)
        except Exception as error:
            self.failed = error  # Lance would bury it in one of its own
            raise
        if result.num_rows != batch.num_rows:
            raise ValueError(f"stage {self.stage.kind!r} must give a row for each of {batch.num_rows}, not {result.num_rows}")
        return result.cast(self.writes)


def _give_back() -> None:
    """Have freed memory go back to the system. glibc keeps all blocks smaller than the largest that was ever freed, in each of Lance's
    threads: a few hundred megabytes of the batches that were. Where another library allocates, nothing happens."""
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 21)
        mallopt(M_TRIM_THRESHOLD, 1 << 24)  # at least a few pictures: else each of them would be paid for with page faults


def deal(
    worker: Callable[..., Callable[[int], str]], where: tuple[Any, ...], todo: Sequence[int], engine: EngineName, workers: int
) -> Iterator[tuple[int, str]]:
    """Fragments and what is said of them, as it comes, by workers that are each made of `where` in the process that they work in."""
    if not todo:
        return
    if engine == "native" and (len(todo) == 1 or workers == 1):  # starting processes would take longer
        here = worker(*where)
        yield from ((number, here(number)) for number in todo)
        return
    daft = start(engine)
    remote = daft.cls(worker, use_process=True, max_concurrency=min(workers, len(todo)))(*where)
    frame = daft.from_pydict({"fragment": list(todo)})
    frame = frame.into_partitions(len(todo)) if engine == "ray" else frame.into_batches(1)
    try:
        for row in frame.with_column("part", remote(frame["fragment"])).iter_rows():
            yield row["fragment"], row["part"]
    except Exception as error:
        raise _own(error) from None


def _own(error: Exception) -> Exception:
    """A user's mistake that a worker found, which Daft tells as the text of an error of its own."""
    told = re.search(rf"\b{UserError.__name__}: (.+)", str(error))
    return UserError(told[1]) if told else error


def start(engine: EngineName) -> Any:
    """Daft, with the engine that is asked for. Ray: the cluster that `RAY_ADDRESS` names, or else one on this machine."""
    try:
        import daft
    except ImportError:
        raise UserError("the data engine needs more packages; install them with: pip install 'mezzotint[data]'") from None
    if engine == "native":
        _run_on(daft, engine)
        return daft
    try:
        import ray
    except ImportError:
        raise UserError("the engine 'ray' needs one more package; install it with: pip install 'mezzotint[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    _run_on(daft, engine)
    return daft


def _run_on(daft: Any, engine: EngineName) -> None:
    """Daft takes an engine once in a process."""
    try:
        daft.set_runner_native() if engine == "native" else daft.set_runner_ray()
    except ValueError:
        if daft.runners.get_or_create_runner().name != engine:
            raise UserError(f"another engine than {engine!r} is at work in this process; start a new one") from None


class _Journal:
    """Which fragments have their new columns on the disk, before they are committed: one small file for each."""

    def __init__(self, table: Table, stage: Stage) -> None:
        self.table, self.stage = table, stage
        name = hashlib.sha256(json.dumps(_due(table, stage), sort_keys=True).encode()).hexdigest()[:16]
        self.folder: Path = table.path / NOTES / f"{stage.kind}-{name}-{table.version}"
        with disk(table.path):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.parts = {int(file.stem): file.read_text() for file in self.folder.glob("*.json")}

    def note(self, fragment: int, part: str) -> None:
        """Remember a fragment, also if the power fails now."""
        self.parts[fragment] = part
        writing = self.folder / f"{fragment}.part"
        with disk(self.table.path):
            writing.write_text(part)
            writing.replace(self.folder / f"{fragment}.json")

    def commit(self) -> Table:
        """Make all new columns visible at once."""
        import lance

        table = self.table
        parts = [lance.FragmentMetadata.from_json(self.parts[number]) for number in table.fragments]
        with disk(table.path):
            schema = _numbered(next(iter(table.fragments.values())), _stamped(table, self.stage))
            committed = lance.LanceDataset.commit(str(table.path), lance.LanceOperation.Merge(parts, schema), read_version=table.version)
        for file in self.folder.iterdir():
            file.unlink()
        with suppress(OSError):
            self.folder.rmdir()
        return type(table)(committed)


def _stamped(table: Table, stage: Stage) -> "pa.Schema":
    return table.stamped(stage.writes, _due(table, stage))


def _numbered(fragment: Any, added: "pa.Schema") -> Any:
    """The schema with more columns, as Lance numbers them. It tells that only when it writes some: here, nulls that nobody will see."""
    import pyarrow as pa

    def nulls(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([pa.nulls(batch.num_rows, field.type) for field in added], schema=added)

    return fragment.merge_columns(nulls, columns=["fault"])[1]


def _due(table: Table, stage: Stage) -> dict[str, Any]:
    """The stamp of the stage's columns, which contains those of the columns that it reads."""
    inputs = {name: table.stamp(name) for name in stage.reads if name in table.columns}
    return {**stage.stamp, "reads": {name: _plain(stamp) for name, stamp in inputs.items() if stamp}}


def _plain(stamp: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stamp.items() if key != "rows"}
