"""From measures to verdicts: which rows are kept, and of the others, why not. Nothing is measured again when a threshold changes.

In: a table with the columns of stages, and cuts. Out: the column `verdict`, "" for what is kept, else the first reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mezzotint import config
from mezzotint.curation.dedup import Duplicates, dedup
from mezzotint.curation.stage import EngineName, Stage, run
from mezzotint.data.table import Table
from mezzotint.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

VERDICT, DUPLICATE = "verdict", "duplicate_of"
AT_ONCE = 65_536  # rows


@dataclass
class Cut(config.Config, kind="cut"):
    """What a column must be for a row to be kept: at least `least`, at most `most`; or `empty`: null, false, "", or a list that is empty or
    has one of these among its values, as faults of several captions have where one of them is sound.

    What was not measured, being null, is no reason. optional: nor is a column that the table does not have.
    """

    column: str
    least: float | None = None
    most: float | None = None
    empty: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        if self.empty == (self.least is not None or self.most is not None):
            raise ValueError(f"cut of {self.column!r} must have least, most or both, or else be empty")

    def fails(self, column: "pa.Array") -> NDArray[np.bool_]:
        """Which of a column's values are no reason to keep the row. Vectorised."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.empty:
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                return np.array([bool(values) and all(values) for values in column.to_pylist()], bool)
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                column = pc.binary_length(column)
            return np.asarray(pc.fill_null(column.cast(pa.bool_()), False))
        values = np.asarray(pc.fill_null(column.cast(pa.float64()), float("nan")))
        with np.errstate(invalid="ignore"):  # comparisons with nan are false
            low = values < self.least if self.least is not None else np.zeros(len(values), bool)
            return low | (values > self.most) if self.most is not None else low

    def reason(self, value: Any) -> str:
        """The verdict on a value that fails."""
        if self.empty:
            said = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            return self.column if isinstance(value, bool) else f"{self.column}: {said}"
        if self.least is not None and value < self.least:
            return f"{self.column} {value:g} is below {self.least:g}"
        return f"{self.column} {value:g} is above {self.most:g}"


FIRST = (  # whatever else is asked for
    Cut("fault", empty=True),
    Cut("opt_out", empty=True),
    Cut("decode_fault", empty=True, optional=True),
    Cut("clip_fault", empty=True, optional=True),
)


@dataclass
class Curation(config.Config, kind="curation"):
    """A recipe. stages: what must be computed. optional: what is computed where its packages are installed. duplicates: what counts as
    the same row. cuts: in order.
    """

    stages: tuple[Stage, ...]
    cuts: tuple[Cut, ...]
    optional: tuple[Stage, ...] = ()
    duplicates: Duplicates = field(default_factory=Duplicates)

    def skipped(self) -> list[str]:
        """What the optional stages lack here, a sentence for each that cannot run."""
        return [stage.missing for stage in self.optional if stage.missing]


def judge(table: Table, cuts: Sequence[Cut]) -> Table:
    """The table with the column `verdict` from `FIRST` and then `cuts`; as it was, where they gave it already.

    The column is stamped with the cuts, those for which the table has no column apart, and with the stamps of the columns.
    """
    import pyarrow as pa

    used = _used(table, cuts)
    stamp = {
        "cuts": [cut.to_data() for cut in used],
        "without": [cut.column for cut in (*FIRST, *cuts) if cut not in used],
        "reads": {cut.column: table.stamp(cut.column) for cut in used},
    }
    if _judged(table) == stamp:
        return table
    return table.with_columns(pa.table({VERDICT: pa.array(verdicts(table, cuts), pa.string())}), stamp)


def verdicts(table: Table, cuts: Sequence[Cut]) -> list[str]:
    """What `judge` would say of every row."""
    used, found = _used(table, cuts), list[str]()
    for batch in table.batches(list(dict.fromkeys(cut.column for cut in used)), rows=AT_ONCE):
        found += _verdicts(batch, used)
    return found


def _used(table: Table, cuts: Sequence[Cut]) -> list[Cut]:
    """Those cuts, after `FIRST`, for which the table has a column. UserError where one that is not optional has none."""
    used = [cut for cut in (*FIRST, *cuts) if not cut.optional or cut.column in table.columns]
    table.check([cut.column for cut in used])
    return used


def _verdicts(batch: "pa.RecordBatch", cuts: Sequence[Cut]) -> list[str]:
    verdicts = np.full(batch.num_rows, "", dtype=object)
    kept = np.ones(batch.num_rows, bool)
    for cut in cuts:
        column = batch[cut.column]
        for row in np.flatnonzero(kept & cut.fails(column)):
            verdicts[row] = cut.reason(column[row].as_py())
            kept[row] = False
    return verdicts.tolist()


def _judged(table: Table) -> dict[str, Any] | None:
    """The stamp of the verdicts, without what the table itself adds."""
    stamp = table.stamp(VERDICT) if VERDICT in table.columns else None
    return {key: value for key, value in stamp.items() if key != "rows"} if stamp else None


def funnel(table: Table) -> dict[str, int]:
    """How many rows each cut took out, in the order of the cuts, under its column's name; and under "kept" what is left.

    UserError where the table has not been judged, or rows came since.
    """
    stamp = _judged(table)
    if stamp is None:
        raise UserError(f"the rows of {str(table.path)!r} have no verdict; give them one with: mezzotint data curate {table.path}")
    counts: Counter[str] = Counter()
    for batch in table.batches([VERDICT], rows=AT_ONCE):
        counts.update(rule(verdict) for verdict in batch[VERDICT].to_pylist())
    return {name: counts[name] for name in dict.fromkeys(cut["column"] for cut in stamp["cuts"])} | {"kept": counts["kept"]}


def rule(verdict: str) -> str:
    """The column whose cut a verdict comes from; "kept" for that of a row that is kept."""
    named = re.match(r"[^ :]+", verdict)
    return named[0] if named else "kept"


def curate(
    table: Table,
    curation: Curation,
    engine: EngineName = "native",
    workers: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
) -> Table:
    """All stages of a recipe that are not done, its duplicates, then the verdicts. What is not installed is told by `Curation.skipped`.

    progress: is told the stage's kind, rows done, and of how many. The caller holds the table's lock. UserError where a stage that is not
    optional lacks packages, before anything is computed.
    """
    if lacking := [stage.missing for stage in curation.stages if stage.missing]:
        raise UserError(lacking[0])
    for stage in (*curation.stages, *(stage for stage in curation.optional if not stage.missing)):
        told = None if progress is None else _of(progress, stage.kind)
        table = run(table, stage, engine, workers, told)
    told = None if progress is None else _of(progress, curation.duplicates.kind)
    others = [cut for cut in curation.cuts if cut.column != DUPLICATE]
    sound = np.array([not verdict for verdict in verdicts(table, others)], bool)
    table = dedup(table, curation.duplicates, engine, workers, told, sound)
    return judge(table, curation.cuts)


def _of(progress: Callable[[str, int, int], None], kind: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(kind, done, total)
