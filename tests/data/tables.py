"""Small tables of pictures, for the tests of tables as a source."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mezzotint.data import table as tables
from mezzotint.data.table import Table


def picture(seed: int, width: int = 12, height: int = 8, kind: str = "PNG") -> bytes:
    """A file of coloured noise, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def row(name: str, content: bytes, **columns: Any) -> dict[str, Any]:
    """A row as ingesting makes it."""
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
    plain = {"media": "image", "captions": [f"{name} one", f"{name} two"], "format": "PNG", "source": "here", "fault": ""}
    sha256 = hashlib.sha256(content).hexdigest()
    return {"id": name, "content": content, "width": width, "height": height, "sha256": sha256, **plain, **columns}


def batches(rows: Iterable[dict[str, Any]]) -> list[pa.RecordBatch]:
    return [pa.RecordBatch.from_pylist(list(rows), schema=tables.schema())]


def create(path: Path, rows: Iterable[dict[str, Any]]) -> Table:
    return Table.create(path, batches(rows))


def damaged(name: str, seed: int) -> dict[str, Any]:
    """A row whose header is sound and whose pixels are not."""
    whole = picture(seed, 64, 64)
    return {**row(name, whole), "content": whole[: len(whole) // 2]}
