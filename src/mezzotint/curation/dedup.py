"""Duplicates: which rows show the same, which of them stays, and which are in an evaluation set.

Rows are the same by their bytes (sha256), by their pictures (`curation.hashes`), or by the cosine of their embeddings, if that is asked
for (SemDeDup, Abbas et al. 2023). Sameness is handed on: what is the same as the same row is one cluster, also where a chain of small
steps leads far. Nothing is removed: columns say what is a duplicate of what, and a filter may read them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mezzotint import config
from mezzotint.curation import hashes
from mezzotint.curation.near import Floats, Look, Rows, pairs
from mezzotint.curation.stage import EngineName, Progress, run, start
from mezzotint.data.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

REVISION = 1  # raised by whoever changes what the same settings find
PROJECTED = 64  # numbers that stand for an embedding in a search
SLACK = 0.1  # how far a cosine may fall by that


@dataclass
class Perceptual(Look, kind="perceptual"):
    """Pictures that are the same but for size, compression, a crop of up to a tenth a side, a little light.

    mirror: or mirrored. crops: False for flat drawings, as icons are: only whole ones in the same light are the same then, and those that
    differ in a sign are not.
    """

    mirror: bool = True
    crops: bool = True
    column = "fingerprint"
    least = 0.8

    def values(self, column: "pa.ChunkedArray | pa.Array") -> tuple[NDArray[Any], NDArray[np.bool_]]:
        return _rows(column, np.dtype(np.uint8), hashes.BYTES)

    def found_by(self, values: NDArray[Any]) -> Floats:
        return hashes.sketches(values, whole=True)[:, 0]

    def looking(self, values: NDArray[Any]) -> Floats:
        found = hashes.sketches(values, whole=not self.crops)
        return np.concatenate([found, hashes.mirrored_sketches(found)], axis=1) if self.mirror else found

    def same(self, values: NDArray[Any], others: NDArray[Any], which: Rows) -> NDArray[np.bool_]:
        windows = hashes.windows() if self.crops else hashes.windows()[:1]
        turned = which >= len(windows)
        values = values.copy()
        values[turned] = hashes.mirrored(values[turned])
        if not self.crops:
            return hashes.equal(values, others)
        cuts = windows[which % len(windows)]
        cuts[turned] = cuts[turned][:, [1, 0, 2, 3]]
        return hashes.alike(values, others, cuts)


@dataclass
class Semantic(Look, kind="semantic"):
    """Rows whose embeddings (`curation.embed`) have a cosine of at least `cosine`. What that means depends on the model: look first.

    They are sought by a random projection, which changes a cosine of 0.95 by about 0.01 (Johnson and Lindenstrauss 1984).
    """

    cosine: float = 0.95
    column: str = "embedding"

    def __post_init__(self) -> None:
        if not 0.5 <= self.cosine <= 1:
            raise ValueError(f"cosine must be between 0.5 and 1, got {self.cosine}")

    @property
    def least(self) -> float:  # type: ignore[override]
        return self.cosine - SLACK

    def values(self, column: "pa.ChunkedArray | pa.Array") -> tuple[NDArray[Any], NDArray[np.bool_]]:
        return _rows(column, np.dtype(f"f{column.type.value_type.bit_width // 8}"), column.type.list_size)

    def found_by(self, values: NDArray[Any]) -> Floats:
        drawn = np.random.default_rng(0).standard_normal((values.shape[1], PROJECTED), np.float32)
        return _unit(_unit(values.astype(np.float32)) @ drawn)

    def looking(self, values: NDArray[Any]) -> Floats:
        return self.found_by(values)[:, None]

    def same(self, values: NDArray[Any], others: NDArray[Any], which: Rows) -> NDArray[np.bool_]:
        one, other = _unit(values.astype(np.float32)), _unit(others.astype(np.float32))
        result: NDArray[np.bool_] = (one * other).sum(1) >= self.cosine
        return result


@dataclass
class Keep:
    """Which row of a cluster stays: a sound one, then the first by `order`, then that of the smallest id.

    area: the most pixels. caption: the longest caption.
    """

    order: tuple[Literal["area", "caption"], ...] = ("area", "caption")

    def best_first(self, rows: "pa.Table") -> Rows:
        """The order of rows with the columns id, sound, area and caption (the length of the longest)."""
        keys = [~rows["sound"].to_numpy(), *(-rows[name].to_numpy() for name in self.order)]
        ids = rows["id"].to_numpy().astype(str)
        return np.lexsort((ids, *reversed(keys)))


@dataclass
class Duplicates(config.Config, kind="duplicates"):
    """What counts as the same, beside equal bytes, and what stays. perceptual, semantic: None to leave them out."""

    perceptual: Perceptual | None = field(default_factory=Perceptual)
    semantic: Semantic | None = None
    keep: Keep = field(default_factory=Keep)

    @cached_property
    def looks(self) -> list[Look]:
        """Those that are on."""
        return [look for look in (self.perceptual, self.semantic) if look]


def dedup(
    table: Table,
    what: Duplicates,
    engine: EngineName = "native",
    workers: int = 2,
    progress: Progress | None = None,
    sound: NDArray[np.bool_] | None = None,
) -> Table:
    """The table with two more columns; as it was, where it has them already. The caller holds its lock.

    cluster: the number of the first row that is the same, its own for a row without a duplicate. duplicate_of: the id of the row of
    the cluster that stays, null for that row itself. sound: (N,) rows that nothing else speaks against, one of which stays if a cluster
    has any; those without a fault, if not given. Other sound rows find the same clusters, and cost next to nothing.
    """
    import pyarrow as pa

    table = _prepared(table, what, engine, workers, progress)
    stamp = _stamp(table, {name: value for name, value in what.to_data().items() if name != "keep"})
    if not _has(table, ("cluster",), stamp):
        found = [_same_bytes(table, engine), *(pairs(table, look, engine, workers) for look in what.looks)]
        table = table.with_columns(pa.table({"cluster": pa.array(clusters(len(table), np.concatenate(found)))}), stamp)
    if sound is None:
        sound = table.read(["fault"])["fault"].to_numpy() == ""
    chosen = stamp | {"keep": what.to_data()["keep"], "sound": hashlib.sha256(sound.tobytes()).hexdigest()[:16]}
    if _has(table, ("duplicate_of",), chosen):
        return table
    of = _stays(table, table.read(["cluster"])["cluster"].to_numpy(), sound, what.keep)
    return table.with_columns(pa.table({"duplicate_of": _ids(table, of)}), chosen)


def contamination(
    table: Table,
    evaluation: Table,
    what: Duplicates,
    engine: EngineName = "native",
    workers: int = 2,
    progress: Progress | None = None,
) -> Table:
    """The table with a column `contaminates`: the id of a row of an evaluation set that a row is the same as, the first one; else null.

    An evaluation set gets fingerprints if it has none. The caller holds the locks of both.
    """
    import pyarrow as pa

    table, evaluation = (_prepared(one, what, engine, workers, progress) for one in (table, evaluation))
    stamp = _stamp(table, what.to_data()) | {"evaluation": str(evaluation.path.resolve()), "evaluation_version": evaluation.version}
    if _has(table, ("contaminates",), stamp):
        return table
    found = [_same_bytes(table, engine, evaluation), *(pairs(table, look, engine, workers, evaluation) for look in what.looks)]
    of = np.full(len(table), len(evaluation))
    for row, other in np.concatenate(found).tolist():
        of[row] = min(of[row], other)
    of[of == len(evaluation)] = -1
    return table.with_columns(pa.table({"contaminates": _ids(evaluation, of)}), stamp)


def clusters(count: int, same: Rows) -> Rows:
    """(count,) the smallest row that each row is connected with by pairs (M, 2): union-find (Galler and Fischer 1964), halving paths."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in same.tolist():
        one, other = root(a), root(b)
        parent[max(one, other)] = min(one, other)
    return np.array([root(row) for row in range(count)], np.int64)


def _prepared(table: Table, what: Duplicates, engine: EngineName, workers: int, progress: Progress | None) -> Table:
    return run(table, hashes.Fingerprints(), engine, workers, progress) if what.perceptual else table


def _stamp(table: Table, settings: dict[str, Any]) -> dict[str, Any]:
    reads = {name: table.stamp(name) for name in ("fingerprint", "embedding") if name in table.columns and settings[LOOKS[name]]}
    return {"stage": settings, "revision": REVISION, "reads": reads}


LOOKS = {"fingerprint": "perceptual", "embedding": "semantic"}


def _has(table: Table, columns: Sequence[str], stamp: dict[str, Any]) -> bool:
    made = [table.stamp(name) for name in columns if name in table.columns]
    return len(made) == len(columns) and all(one is not None and {k: v for k, v in one.items() if k != "rows"} == stamp for one in made)


def _same_bytes(table: Table, engine: EngineName, among: Table | None = None) -> Rows:
    """(M, 2) pairs of a row and the first one with the same content, here or among other rows."""
    import pyarrow as pa

    daft = start(engine)

    def frame(of: Table, name: str) -> Any:
        rows = pa.table({"sha256": of.read(["sha256"])["sha256"], name: pa.array(np.arange(len(of)))})
        return daft.from_arrow(rows.filter(pa.compute.not_equal(rows["sha256"], "")))

    firsts = frame(among or table, "first").groupby("sha256").agg(daft.col("first").min())
    same = frame(table, "row").join(firsts, on="sha256").select("row", "first").to_pydict()
    found = np.stack([np.array(same[name], np.int64) for name in ("row", "first")], axis=1)
    return found if among else found[found[:, 0] != found[:, 1]]


def _stays(table: Table, cluster: Rows, sound: NDArray[np.bool_], keep: Keep) -> Rows:
    """(N,) the row that stays of the cluster of each, -1 for that row itself."""
    import pyarrow as pa

    sizes = np.bincount(cluster, minlength=len(cluster))
    rows = np.flatnonzero(sizes[cluster] > 1)
    of = np.full(len(cluster), -1)
    if not len(rows):
        return of
    chosen, caption, first = np.isin(np.arange(len(cluster)), rows), np.zeros(len(cluster), np.int64), 0
    for batch in table.batches(["captions"]):
        caption[first : first + batch.num_rows] = [max(map(len, variants or [""])) for variants in batch["captions"].to_pylist()]
        first += batch.num_rows
    plain = table.read(["id", "width", "height"]).filter(pa.array(chosen))
    area = plain["width"].to_numpy().astype(np.int64) * plain["height"].to_numpy()
    for name, values in {"area": area, "caption": caption[rows], "sound": sound[rows]}.items():
        plain = plain.append_column(name, pa.array(values))
    best_first = rows[keep.best_first(plain)]
    found, first_place = np.unique(cluster[best_first], return_index=True)
    of[rows] = best_first[first_place][np.searchsorted(found, cluster[rows])]
    of[of == np.arange(len(of))] = -1
    return of


def _ids(table: Table, rows: Rows) -> "pa.Array":
    """The ids of rows, null for -1."""
    import pyarrow as pa

    return table.read(["id"])["id"].take(pa.array(rows, mask=rows < 0)).combine_chunks().cast(pa.string())


def _rows(column: "pa.ChunkedArray | pa.Array", kind: np.dtype[Any], width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(N, width) of the rows of a fixed width that are not null, and which these are."""
    import pyarrow as pa

    there_is = column.is_valid().to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.is_valid().to_numpy()
    flat = column.drop_null()
    flat = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    if pa.types.is_fixed_size_list(flat.type):
        values = flat.flatten().to_numpy(zero_copy_only=False).astype(kind, copy=False)
    else:
        values = np.frombuffer(b"".join(flat.to_pylist()), kind)
    return values.reshape(-1, width), there_is


def _unit(x: Floats) -> Floats:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    result: Floats = np.where(np.isfinite(norm) & (norm > 0), x / np.maximum(norm, 1e-12), 0).astype(np.float32)
    return result
