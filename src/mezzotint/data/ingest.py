"""Where it fits: a heap of files to a table, one row for each image or clip, with where it is from.

In: a source: a folder, kohya's folders, tars, Parquet, a data set of Hugging Face's, a list of addresses. Out: the table, and a report of
what is in it and what was set aside.
How: items come from a reader one after another (`data.sources`, `data.records`), are looked into without decoding (`data.header`), and go
to the table in batches of bounded size; the table, or what is added to it, appears when all of them are written.
Gotchas: the same command again adds what is new and nothing else, whether it was killed or not. A row that cannot be used is there, with
its `fault`. The ids of a table are kept in memory while rows are added: about a hundred bytes each.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mezzotint.data import records, sources
from mezzotint.data.download import download
from mezzotint.data.fetch import Manners
from mezzotint.data.header import LIMIT
from mezzotint.data.sources import SEEN, Item, Reader, as_row
from mezzotint.data.survey import Bad, identity
from mezzotint.data.table import ROWS, Table, is_table, schema
from mezzotint.errors import UserError
from mezzotint.locks import alone

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["folder", "kohya", "tars", "parquet", "saved", "hub", "addresses"]
Progress = Callable[[str, int], None]  # "fetched" or "rows", and how many by now
BYTES = 1 << 26  # of a batch of rows
THREADS = 4
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
READERS: dict[Kind, Reader] = {
    "folder": sources.folder,
    "kohya": sources.kohya,
    "tars": sources.tars,
    "parquet": records.parquet,
    "saved": records.saved,
}


@dataclass
class Report:
    """What came of a source.

    rows: added to the table. media: how many of them are images, clips. faults: rows that cannot be used, by the kind of the reason.
    known: items whose ids the table had already. aside: what did not become a row, with reasons.
    """

    source: str
    kind: Kind
    rows: int = 0
    known: int = 0
    media: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # row of each kind of fault
    aside: list[Bad] = field(default_factory=list)

    def __str__(self) -> str:
        """A few lines for a person."""
        media = ", ".join(f"{count:,} {kind}s" for kind, count in sorted(self.media.items())) or "nothing new"
        lines = [f"{self.rows:,} rows from {self.source!r} ({self.kind}): {media}"]
        lines += [f"{self.known:,} were there already"] * bool(self.known)
        lines += [f"{sum(self.faults.values()):,} of the rows cannot be used"] * bool(self.faults)
        lines += [f"  {count:,} {kind} (first: {self.first[kind]!r})" for kind, count in self.faults.most_common(8)]
        kinds = Counter(bad.reason.partition(":")[0] for bad in self.aside)
        first = {bad.reason.partition(":")[0]: bad.file for bad in reversed(self.aside)}
        lines += [f"{len(self.aside):,} set aside"] * bool(self.aside)
        lines += [f"  {count:,} {kind} (first: {first[kind]!r})" for kind, count in kinds.most_common(8)]
        return "\n".join(lines)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count rows."""
        self.rows += len(rows)
        self.media.update(row["media"] for row in rows)
        for row in rows:
            if row["fault"]:
                kind = row["fault"].partition(":")[0]
                self.faults[kind] += 1
                self.first.setdefault(kind, row["id"])


def recognise(source: str) -> Kind:
    """What kind of source lies at a path, or `hub` where nothing lies there and it could be a name on the hub."""
    path = Path(source)
    if path.is_dir():
        return _recognise_folder(path)
    if not path.exists():
        if HUB.fullmatch(source):
            return "hub"
        raise UserError(f"there is no file or folder {source!r}; check the path")
    ending = path.suffix.lower()
    if ending == ".tar":
        return "tars"
    if ending == ".parquet":
        return "parquet" if records.has_images(path) else "addresses"
    if ending == ".arrow":
        return "saved"
    if ending in records.LISTS:
        return "addresses"
    if ending in SEEN:
        raise UserError(f"{source!r} is one image or clip; give the folder that holds it")
    raise UserError(f"{source!r} is no source: a folder, .tar, .parquet, .arrow, or a list of addresses in {', '.join(records.LISTS)}")


def _recognise_folder(path: Path) -> Kind:
    try:
        names = {entry.name for entry in os.scandir(path)}
        if names & set(records.SAVED):
            return "saved"
        if is_table(path):
            raise UserError(f"{str(path)!r} is a table already; give what it was made from, or another source")
        below = names | {name.name for folder in path.iterdir() if folder.is_dir() for name in os.scandir(folder)}
    except PermissionError as error:
        raise UserError(f"no permission to read the folder {error.filename!r}; allow it or choose another folder") from None
    endings = {os.path.splitext(name)[1].lower() for name in below if not name.startswith(".")}
    if ".tar" in endings:
        return "tars"
    if ".parquet" in endings and not endings & set(SEEN):
        return "parquet"
    return "kohya" if sources.is_kohya(str(path)) else "folder"


def ingest(
    source: str, out: str | Path, manners: Manners | None = None, limit: int = LIMIT, progress: Progress | None = None
) -> tuple[Table, Report]:
    """The table at `out` with all of a source in it: a new one, or the one that is there with what it does not have yet.

    limit: bytes of a file; the content of a larger one is left out. manners: towards the servers of a list of addresses.
    Raises `UserError` if there is nothing at the source, or it is not what it seems, or `out` cannot be written.
    """
    kind = recognise(source)
    if os.path.exists(out) and not is_table(out):
        raise UserError(f"{str(out)!r} is there already and is no table; choose another name with --out, or remove it")
    report = Report(source, kind)
    with _workplace(out) as work:
        table = Table.open(out) if is_table(out) else None
        known = set(table.read(["id"])["id"].to_pylist()) if table else set()
        items = _new(_items(kind, source, work, known, manners, progress), known, report)
        failed: list[BaseException] = []
        batches = _batches(items, report, limit, progress)
        first = next(batches, None)
        if first is not None:
            try:
                table = _written(_watched(chain([first], batches), failed), table, work, Path(out))
            except Exception:
                if failed:  # which Lance would tell as its own
                    raise failed[0] from None
                raise
    if table is None:
        raise UserError(f"no image or clip in {source!r}; choose another source, with files that end in {', '.join(SEEN[:5])} or the like")
    return table, report


def _written(rows: "Iterable[pa.RecordBatch]", table: Table | None, work: Path, out: Path) -> Table:
    if table is not None:
        with table.locked():
            return table.append(rows)
    Table.create(work / "table", rows)
    os.rename(work / "table", out)
    return Table.open(out)


@contextmanager
def _workplace(out: str | Path) -> Iterator[Path]:
    """A folder beside the table for what is not done yet. What was fetched stays in it until all is done; a second run is kept out."""
    work = Path(f"{out}.part")
    with alone(work, Path(out)):
        try:
            shutil.rmtree(work / "table", ignore_errors=True)  # of a run that was killed
            yield work
            shutil.rmtree(work)
        except BaseException:
            shutil.rmtree(work / "table", ignore_errors=True)
            with suppress(OSError):
                work.rmdir()  # if nothing was fetched
            raise


def _items(
    kind: Kind, source: str, work: Path, known: set[str], manners: Manners | None, progress: Progress | None
) -> Iterator[Item | Bad]:
    if kind == "hub":
        folder = records.hub(source, work / "hub")
        for found in READERS[recognise(folder)](folder):
            yield replace(found, source=source) if isinstance(found, Item) else found
    elif kind == "addresses":
        yield from _fetched(source, work / "fetched", known, manners, progress)
    else:
        yield from READERS[kind](source)


def _fetched(source: str, folder: Path, known: set[str], manners: Manners | None, progress: Progress | None) -> Iterator[Item | Bad]:
    """The files of a list of addresses, in its order, when all are fetched that the table does not have."""
    wanted = (found[0] for found in records.addresses(source) if not isinstance(found, Bad) and identity(found[0]) not in known)
    journal = download(wanted, folder, manners, partial(progress, "fetched") if progress else None)
    for found in records.addresses(source):
        if isinstance(found, Bad):
            yield found
        else:
            url, notes = found
            result = journal.results.get(url)
            place = journal.path(result) if result and result.sha256 else None
            if result and result.opt_out:
                notes = replace(notes, opt_out=True)
            yield Item(identity(url), place, identity(os.path.basename(source)), notes, result.fault if result else "")


def _new(found: Iterable[Item | Bad], known: set[str], report: Report) -> Iterator[Item]:
    """The items whose ids are new to the table; what is none goes to the report."""
    seen: set[str] = set()
    for item in found:
        if isinstance(item, Bad):
            report.aside.append(item)
        elif item.id in known:
            report.known += 1
        elif item.id in seen:
            report.aside.append(Bad(item.id, "a second item of this id"))
        else:
            seen.add(item.id)
            yield item


def _batches(items: Iterable[Item], report: Report, limit: int, progress: Progress | None) -> "Iterator[pa.RecordBatch]":
    """Rows in batches of at most `ROWS` and about `BYTES`."""
    import pyarrow as pa

    with ThreadPoolExecutor(THREADS) as pool:
        for group in _groups(items, limit):
            rows = list(pool.map(partial(as_row, limit=limit), group))
            report.add(rows)
            yield pa.RecordBatch.from_pylist(rows, schema=schema())
            if progress:
                progress("rows", report.rows)


def _groups(items: Iterable[Item], limit: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    size = 0
    for item in items:
        more = item.size if item.size <= limit else 0
        if group and (len(group) == ROWS or size + more > BYTES):
            yield group
            group, size = [], 0
        group.append(item)
        size += more
    if group:
        yield group


def _watched(batches: "Iterable[pa.RecordBatch]", failed: list[BaseException]) -> "Iterator[pa.RecordBatch]":
    """The same batches; remembers what went wrong in making them."""
    try:
        yield from batches
    except BaseException as error:
        failed.append(error)
        raise
