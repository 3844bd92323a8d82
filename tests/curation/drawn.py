"""Small tables of pictures, for the tests of what is computed over them."""

import hashlib
import io
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mezzotint.data import table as tables
from mezzotint.data.table import Table

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "data_dedup.py"))


@dataclass
class Row:
    """What a test says of a row."""

    id: str
    content: bytes | None
    captions: Sequence[str] = ()
    fault: str = ""
    size: tuple[int, int] = (8, 8)


def make(path: Path, rows: Sequence[Row]) -> Table:
    plain: dict[str, Any] = {"media": "image", "format": "PNG", "source": "", "url": None, "licence": None, "opt_out": None}
    data = [
        plain
        | {"id": row.id, "content": row.content, "captions": list(row.captions), "fault": row.fault}
        | {"width": row.size[0], "height": row.size[1]}
        | {"sha256": hashlib.sha256(row.content).hexdigest() if row.content is not None else ""}
        for row in rows
    ]
    return Table.create(path, [pa.RecordBatch.from_pylist(data, schema=tables.schema())] if data else [])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def photo(seed: int, width: int = 96) -> Image.Image:
    """A picture of dead leaves, as in the bench."""
    image: Image.Image = BENCH["photo"](np.random.default_rng(seed), width)
    return image
