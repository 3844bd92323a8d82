"""From a function of one row to the computation of a stage."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from mezzotint.curation.stage import Compute
from mezzotint.data.decode import UnusableError, bounded, opened

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]  # values by column; null for what is not there


def by_row(writes: "pa.Schema", compute: Callable[[Row], Row]) -> Compute:
    """Calls a function for each row of a batch, with the columns that the stage reads."""
    import pyarrow as pa

    def batch(rows: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([compute(row) for row in rows.to_pylist()], schema=writes)

    return batch


def by_picture(writes: "pa.Schema", side: int, compute: Callable[[Image.Image], Row]) -> Compute:
    """Calls a function for each picture, its longer side at most `side`. Nulls for clips and for what cannot be decoded, of which `probe`
    tells the reason. Reads "content" and "media"."""

    def one(row: Row) -> Row:
        if row["media"] != "image" or row["content"] is None:
            return {}
        try:
            with opened(row["content"]) as image:
                picture = bounded(image, side)
        except UnusableError:
            return {}
        return compute(picture)

    return by_row(writes, one)
