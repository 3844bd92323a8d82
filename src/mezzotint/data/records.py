"""Where it fits: heaps that are tables already: Parquet, Hugging Face's data sets, and lists of addresses.

In: files of Parquet or Arrow with a column of images (bytes, or Hugging Face's struct of bytes and path), on this disk or on the hub; or
lists of addresses: one a line, or columns as img2dataset reads them. Out: items, or addresses with what is said of them.
Gotchas: a column is found by its name, or by its type where only one can hold images. An id is the file and the number of the row.
"""

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.data.header import LIMIT, too_large
from mezzotint.data.sources import Item, Notes, noted, shards
from mezzotint.data.survey import Bad, Row, csv_rows, identity, is_utf8, json_rows
from mezzotint.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "video", "mp4")
URLS = ("url", "image_url", "img_url")
LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")  # that addresses come in
SAVED = ("state.json", "dataset_dict.json")  # beside which `save_to_disk` puts its Arrow files
ROWS = 16  # of images that are in memory at once


def parquet(path: str) -> Iterator[Item | Bad]:
    """A file of Parquet with a column of images, or a folder of them."""
    for name, place in shards(path, (".parquet",)):
        yield from _shard(name, place, Path(path))


def saved(path: str) -> Iterator[Item | Bad]:
    """What `datasets.save_to_disk` wrote, with all its splits."""
    for name, place in shards(path, (".arrow",)):
        if not name.endswith((*SAVED, "dataset_info.json")):  # these hold no rows
            yield from _shard(name, place, Path(path))


def has_images(path: Path) -> bool:
    """Whether a file of Parquet has a column of images; false if its images are addresses. `UserError` if it has neither."""
    schema = _parquet_schema(path)
    names = {name.lower() for name in schema.names}
    if not names & set(IMAGES) and names & set(URLS):
        return False
    _image_column(schema, path.name)
    return True


def hub(name: str, folder: Path) -> str:
    """Fetch a data set of Hugging Face's hub into a folder, as far as it is not there yet. Returns the folder."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError(f"there is no file or folder {name!r}; if it is a name on the hub, first: pip install huggingface_hub") from None
    try:
        return str(snapshot_download(name, repo_type="dataset", local_dir=folder))
    except (OSError, ValueError) as error:
        reason = "the hub refuses a data set of this name" if isinstance(error, HfHubHTTPError) else "the hub cannot be reached"
        raise UserError(f"there is no file or folder {name!r}, and {reason}; check the name and the connection") from error


# Images in columns.


def _shard(name: str, place: Path | str, root: Path) -> Iterator[Item | Bad]:
    """The rows of one file. What cannot be read of it is set aside; a column of a wrong type is a `UserError`."""
    import pyarrow as pa

    if isinstance(place, str):
        yield Bad(name, place)
        return
    number = 0
    try:
        with closing(_batches(place)) as batches:
            for batch in batches:
                column = _image_column(batch.schema, name)
                for row in batch.to_pylist():
                    yield _of_row(row, column, f"{name}:{number}", name, root if root.is_dir() else root.parent)
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Bad(name, f"damaged table: {' '.join(str(error).split())[:200]}; what follows row {number:,} is lost")


def _batches(path: Path) -> "Generator[pa.RecordBatch, None, None]":
    """The batches of a file of Parquet or Arrow, no more in memory than one of them."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    if path.suffix == ".parquet":
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield from file.iter_batches(ROWS)
        return
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            batch.validate(full=True)  # or a damaged file would be read beyond its end
            for start in range(0, batch.num_rows, ROWS):
                yield batch.slice(start, ROWS)


def _parquet_schema(path: Path) -> "pa.Schema":
    import pyarrow as pa
    from pyarrow import parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{str(path)!r} cannot be read as Parquet ({reason}); fetch it again or remove it") from None


def _image_column(schema: "pa.Schema", name: str) -> str:
    """The column that holds the images."""
    named = [field for field in schema if field.name.lower() in IMAGES]
    for field in named:
        if _holds_images(field.type):
            return str(field.name)
    if named:
        raise UserError(
            f"column {named[0].name!r} of {name!r} is {named[0].type}; a column of images holds bytes, or a struct of bytes and path"
        )
    able = [field.name for field in schema if _holds_images(field.type)]
    if len(able) == 1:
        return str(able[0])
    found = f"{len(able)} columns of bytes ({', '.join(able)})" if able else f"no column of bytes among {', '.join(schema.names)}"
    raise UserError(f"{name!r} has {found}; name the one with the images 'image'")


def _holds_images(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _of_row(row: Mapping[str, Any], column: str, id: str, name: str, root: Path) -> Item:
    cell = row[column]
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    notes = noted({key: value for key, value in row.items() if key != column})
    fault = "" if content is not None else "no content: the row is empty"
    if content is None and path:
        content, fault = _pointed_at(root, str(path))
    if isinstance(content, bytes) and len(content) > LIMIT:
        content, fault = None, too_large(LIMIT)
    return Item(identity(id), content, identity(name), notes, fault)


def _pointed_at(root: Path, path: str) -> tuple[Path | None, str]:
    """The file beside the table that a row points at, or why there is none."""
    place = Path(os.path.realpath(root / path)) if "\0" not in path else root
    if not place.is_relative_to(os.path.realpath(root)):
        return None, f"path out of the folder: {path!r}"
    return (place, "") if place.is_file() else (None, f"no such file: {path!r}")


# Addresses.


def addresses(path: str) -> Iterator[tuple[str, Notes] | Bad]:
    """Addresses in the order of the list, each with what its row says. A line of a `.txt` is an address."""
    name = os.path.basename(path)
    for line, row in _rows(Path(path)):
        cells = {key.lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        url = next((cells[key] for key in URLS if cells.get(key)), None)
        if isinstance(row, str):
            yield Bad(f"{name}:{line}", row)
        elif not isinstance(url, str) or not url.strip():
            yield Bad(f"{name}:{line}", f"unreadable row: no {' or '.join(URLS)}")
        elif not is_utf8(url):
            yield Bad(f"{name}:{line}", "unreadable row: not UTF-8")
        else:
            yield url.strip(), replace(noted(cells), url=url.strip())


def _rows(path: Path) -> Iterable[tuple[int, Row]]:
    if path.suffix == ".parquet":
        rows = (row for batch in _batches(path) for row in batch.to_pylist())
        yield from enumerate(rows)
        return
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="" if path.suffix in (".csv", ".tsv") else "\n") as file:
            if path.suffix == ".txt":
                yield from ((number, {"url": line}) for number, line in enumerate(file, 1) if line.strip())
            elif path.suffix == ".jsonl":
                yield from json_rows(file)
            else:
                yield from csv_rows(file, "\t" if path.suffix == ".tsv" else ",")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read, {error.strerror}; allow it or choose another list") from None
