"""Where it fits: data at rest. A Lance table with one row for each image or clip.

In: rows with the bytes of files (`data.ingest`), and columns that stages compute from them (`curation`).
Out: columns in batches, rows at random, and versions: every change makes a new one, and an old one stays readable by its number.
Gotchas: the bytes are written once; a stage adds columns beside them. Rows are in fragments of at most `ROWS`, which are the unit of
work, and of what is lost when a process is killed. Rows keep their numbers, 0, 1, ...: nothing here compacts a table.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mezzotint.errors import UserError, unknown
from mezzotint.locks import alone

if TYPE_CHECKING:
    import lance
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

ROWS = 1024
STAMP = b"mezzotint:stage"  # in a column's metadata: which stage made it, from what
NOTES = "mezzotint"  # folder in the table for what is not rows: the journal of a stage that is not done, and the lock


def schema() -> "pa.Schema":
    """What every table has.

    id: unique and stable; a path relative to the source, or a key of the source. content: the file as it was found, null if it could
    not be read. media: "image" or "clip". captions: the variants of one caption, in order. width, height: of the header, turned
    upright, 0 if there is none. format: the decoder's name. sha256: of the content. source: where it was read from. url, licence,
    opt_out: as far as they are known. repeats: how often an epoch shows the row, null for once. fault: why the row cannot be used, "" if
    it can as far as the header tells.
    """
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("content", pa.large_binary()),
            pa.field("media", pa.string(), nullable=False),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("format", pa.string(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("url", pa.string()),
            pa.field("licence", pa.string()),
            pa.field("opt_out", pa.bool_()),
            pa.field("repeats", pa.int32()),
            pa.field("fault", pa.string(), nullable=False),
        ]
    )


class Table:
    """A table at one version. `latest` follows it."""

    def __init__(self, dataset: "lance.LanceDataset") -> None:
        self.dataset = dataset

    @classmethod
    def open(cls, path: str | Path, version: int | str | None = None) -> Self:
        """A table that is there; `version` is a number or the name of a snapshot, the newest if not given."""
        lance = _lance()
        if not is_table(path):
            raise UserError(f"there is no table at {str(path)!r}; make one with: mezzotint data ingest SOURCE --out {path}")
        try:
            return cls(lance.dataset(str(path), version=version))
        except (OSError, ValueError) as error:
            found = lance.dataset(str(path))
            names = [*found.tags.list(), *(str(v["version"]) for v in found.versions())]
            raise unknown(f"version of {str(path)!r}", str(version), names) from error

    @classmethod
    def create(cls, path: str | Path, rows: "Iterable[pa.RecordBatch]") -> Self:
        """A new table of `rows`, which appears when all of them are written."""
        lance = _lance()
        if os.path.exists(path):
            raise UserError(f"{str(path)!r} is there already; choose another name with --out, or remove it")
        with disk(path):
            return cls(lance.write_dataset(_reader(rows, schema()), str(path), max_rows_per_file=ROWS, max_rows_per_group=ROWS))

    def append(self, rows: "Iterable[pa.RecordBatch]") -> Self:
        """The table with more rows, all of them or none. Stages that were done are due again, for all rows."""
        lance = _lance()
        with disk(self.path):
            return type(self)(
                lance.write_dataset(_reader(rows, schema()), str(self.path), mode="append", max_rows_per_file=ROWS, max_rows_per_group=ROWS)
            )

    @property
    def path(self) -> Path:
        """Its folder."""
        return Path(self.dataset.uri)

    @property
    def version(self) -> int:
        """The number of this version."""
        return int(self.dataset.version)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.dataset.schema.names)

    @property
    def latest(self) -> Self:
        """The newest version."""
        return type(self).open(self.path)

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    def batches(self, columns: Sequence[str], rows: int = ROWS, fragment: int | None = None) -> "Iterator[pa.RecordBatch]":
        """All rows of some columns in order, at most `rows` at once, or those of one fragment. No more than these are in memory."""
        self.check(columns)
        for one in self.fragments.values() if fragment is None else [self.fragments[fragment]]:
            for first in range(0, one.count_rows(), rows):  # a scan of all would read a page of the disk whole, and others ahead
                yield from one.scanner(columns=list(columns), limit=rows, offset=first, batch_size=rows).to_batches()

    def read(self, columns: Sequence[str]) -> "pa.Table":
        """Some columns whole: for those that are small."""
        self.check(columns)
        return self.dataset.to_table(columns=list(columns))

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> "pa.Table":
        """Rows by their numbers, in this order."""
        self.check(columns)
        return self.dataset.take(list(rows), columns=list(columns))

    def matching(self, condition: str) -> "NDArray[np.bool_]":
        """(N,) which rows fulfil a condition on columns, written as in SQL. UserError where it is none."""
        import numpy as np

        try:
            rows = self.dataset.to_table(columns=["_rowoffset"], filter=condition)["_rowoffset"].to_numpy()
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split(", /")[0].split())
            raise UserError(f"{condition!r} is no condition on the rows of {str(self.path)!r}: {reason}") from error
        matching = np.zeros(len(self), dtype=bool)
        matching[rows] = True
        return matching

    def check(self, columns: Sequence[str]) -> None:
        """A `UserError` that names the nearest, where there is no such column."""
        for name in columns:
            if name not in self.columns:
                raise unknown(f"column of {str(self.path)!r}", name, self.columns)

    @property
    def fragments(self) -> "dict[int, lance.LanceFragment]":
        """The parts that rows are written in, by number, in the order of rows."""
        return {fragment.fragment_id: fragment for fragment in self.dataset.get_fragments()}

    def stamp(self, column: str) -> dict[str, Any] | None:
        """Which stage made a column, from what; None for what was ingested, and where rows came since."""
        metadata = self.dataset.schema.field(column).metadata or {}
        stamp = json.loads(metadata[STAMP]) if STAMP in metadata else None
        return stamp if stamp and stamp["rows"] == len(self) else None

    def stamped(self, columns: "pa.Schema", stamp: dict[str, Any]) -> "pa.Schema":
        """Columns that say which stage made them."""
        import pyarrow as pa

        metadata = {STAMP: json.dumps({**stamp, "rows": len(self)}, sort_keys=True).encode()}
        return pa.schema([field.with_metadata(metadata) for field in columns])

    def with_columns(self, columns: "pa.Table", stamp: dict[str, Any]) -> Self:
        """The table with columns that were computed from all rows at once, in the order of rows; those of these names are replaced."""
        if columns.num_rows != len(self):
            raise ValueError(f"columns must have a value for each of the {len(self)} rows, not {columns.num_rows}")
        table = self.without(columns.schema.names)
        with disk(self.path):
            table.dataset.add_columns(columns.cast(self.stamped(columns.schema, stamp)).to_reader(max_chunksize=ROWS))
        return table.latest

    def without(self, columns: Sequence[str]) -> Self:
        """The table without those of these columns that it has."""
        present = [name for name in columns if name in self.columns]
        if not present:
            return self
        with disk(self.path):
            self.dataset.drop_columns(present)
        return self.latest

    def snapshot(self, name: str) -> None:
        """Give this version a name, by which `open` finds it."""
        if name in self.dataset.tags.list():
            raise UserError(f"{str(self.path)!r} has a snapshot {name!r} already; choose another name")
        self.dataset.tags.create(name, self.version)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While what changes the table runs: a second one that tries it is told so."""
        with disk(self.path):
            notes = self.path / NOTES
            notes.mkdir(exist_ok=True)
        with alone(notes, Path(self.path)):
            yield


def is_table(path: str | Path) -> bool:
    """Whether there is a table at a path."""
    return os.path.isdir(os.path.join(path, "_versions"))


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise UserError("tables need more packages; install them with: pip install 'mezzotint[data]'") from None
    return lance


def _reader(rows: "Iterable[pa.RecordBatch]", of: "pa.Schema") -> "pa.RecordBatchReader":
    import pyarrow as pa

    return pa.RecordBatchReader.from_batches(of, rows)


@contextmanager
def disk(path: str | Path) -> Iterator[None]:
    """A disk that is full or must not be written to is a `UserError`; what was there before stays."""
    try:
        yield
    except OSError as error:
        text = str(error)
        if error.errno == errno.ENOSPC or "No space left" in text or "StorageFull" in text:
            raise UserError(f"no space left for {str(path)!r}; make room and give the same command again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) or "ermission denied" in text:
            raise UserError(f"no permission to write {str(path)!r}; choose another place with --out") from error
        raise
