"""Parquet, Hugging Face's data sets and lists of addresses as heaps."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
from heaps import drawn, encoded
from pyarrow import parquet as pq
from test_sources import split

from mezzotint.data import records
from mezzotint.data.ingest import recognise
from mezzotint.data.records import addresses, has_images, hub, parquet, saved
from mezzotint.data.sources import Notes
from mezzotint.data.survey import Bad
from mezzotint.errors import UserError

PNG, JPEG = encoded(drawn(0)), encoded(drawn(1), "JPEG")
STRUCTS = pa.array(
    [{"bytes": PNG, "path": "a.png"}, {"bytes": JPEG, "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
)


def written(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_columns_of_bytes_and_of_structs_are_images(tmp_path: Path) -> None:
    plain = written(tmp_path / "a.parquet", bytes=[PNG, JPEG], text=["one", None], license=["CC0", None], label=[1, 2])
    items, bad = split(list(parquet(plain)))
    assert [(id, item.content, item.notes) for id, item in items.items()] == [
        ("a.parquet:0", PNG, Notes(("one",), None, "CC0")),
        ("a.parquet:1", JPEG, Notes()),
    ]
    written(tmp_path / "b.parquet", image=STRUCTS, caption=[["x", "y"], []])
    items, bad = split(list(parquet(str(tmp_path))))
    assert list(items) == ["a.parquet:0", "a.parquet:1", "b.parquet:0", "b.parquet:1"]
    assert items["b.parquet:0"].notes.captions == ("x", "y")
    assert items["b.parquet:1"].content == JPEG
    assert bad == {}
    assert recognise(str(tmp_path)) == recognise(plain) == "parquet"


def test_a_row_without_bytes_may_point_at_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    paths = ["a.png", "b.png", "../a.png", "/etc/passwd", "a\0", None]
    cells = pa.array([{"bytes": None, "path": path} for path in paths], STRUCTS.type)
    items, _ = split(list(parquet(written(tmp_path / "x.parquet", image=cells))))
    assert [item.content for item in items.values()] == [tmp_path / "a.png", *[None] * 5]
    assert [item.fault.partition(":")[0] for item in items.values()] == [
        "", "no such file", "path out of the folder", "path out of the folder", "no such file", "no content",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2]}, "column 'image' of 'a.parquet' is int64; a column of images holds bytes"),
        ({"image": ["a", "b"]}, "column 'image' of 'a.parquet' is string"),
        ({"one": [PNG], "two": [PNG]}, "2 columns of bytes .one, two.; name the one with the images 'image'"),
        ({"x": [1], "label": [2]}, "no column of bytes among x, label"),
    ],
)
def test_columns_of_wrong_types_are_named(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    path = written(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=message):
        list(parquet(path))
    with pytest.raises(UserError, match=message):
        recognise(path)


def test_a_damaged_file_gives_what_can_be_read_of_it(tmp_path: Path) -> None:
    content = Path(written(tmp_path / "a.parquet", image=[PNG] * 40)).read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    items, bad = split(list(parquet(str(tmp_path))))
    assert len(items) == 40
    assert {file: reason.partition(":")[0] for file, reason in bad.items()} == {"b.parquet": "damaged table", "c.parquet": "damaged table"}
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        has_images(tmp_path / "b.parquet")


def stream(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=1)


def test_what_datasets_saves_is_read_with_its_splits(tmp_path: Path) -> None:
    table = pa.table({"image": STRUCTS, "text": ["one", "two"]})
    for part in ("train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"):
        stream(tmp_path / part, table)
        (tmp_path / part).with_name("state.json").write_text("{}")
        (tmp_path / part).with_name("dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert recognise(str(tmp_path)) == recognise(str(tmp_path / "train")) == "saved"
    items, bad = split(list(saved(str(tmp_path))))
    assert [(id, *item.notes.captions) for id, item in items.items()] == [
        (f"{part}/data-00000-of-00001.arrow:{row}", text) for part in ("test", "train") for row, text in enumerate(("one", "two"))
    ]
    assert bad == {}
    cut = (tmp_path / "train/data-00000-of-00001.arrow").read_bytes()
    (tmp_path / "train/data-00000-of-00001.arrow").write_bytes(cut[:-100])
    items, bad = split(list(saved(str(tmp_path / "train"))))
    assert 0 < len(items) <= 2
    assert len(bad) == 2 - len(items)


def test_the_hub_is_one_line_when_it_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recognise("somebody/a-data.set") == "hub"
    offline, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})  # type: ignore[attr-defined]
    raised: list[Exception] = [ConnectionError("no\nroute"), errors.HfHubHTTPError("401")]

    def download(name: str, **options: object) -> None:
        raise raised.pop(0)

    offline.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", offline)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    for reason in ("the hub cannot be reached", "the hub refuses"):
        with pytest.raises(UserError, match=reason) as caught:
            hub("somebody/a-data.set", tmp_path)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        hub("somebody/a-data.set", tmp_path)


ROWS = [{"url": "http://a/1.png", "text": "one"}, {"URL": "http://a/2.png", "caption": "two", "license": "CC0"}]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_lists_of_addresses_come_in_many_forms(tmp_path: Path, ending: str) -> None:
    path, mark = tmp_path / f"list{ending}", "\t" if ending == ".tsv" else ","
    if ending == ".parquet":
        written(path, URL=["http://a/1.png", "http://a/2.png"], TEXT=["one", "two"])
    elif ending == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        path.write_text("\n".join(mark.join(row) for row in (("url", "caption"), ("http://a/1.png", '"one"'), (" http://a/2.png ", "two"))))
    assert recognise(str(path)) == "addresses"
    found = [(url, notes.url, *notes.captions) for url, notes in (row for row in addresses(str(path)) if not isinstance(row, Bad))]
    assert found == [("http://a/1.png", "http://a/1.png", "one"), ("http://a/2.png", "http://a/2.png", "two")]


def test_lines_without_an_address_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"http://a/1.png\r\n\nhttp://\xff/\nhttp://a/2.png")
    found = list(addresses(str(tmp_path / "a.txt")))
    assert [row[0] for row in found if not isinstance(row, Bad)] == ["http://a/1.png", "http://a/2.png"]
    assert [row for row in found if isinstance(row, Bad)] == [Bad("a.txt:3", "unreadable row: not UTF-8")]
    (tmp_path / "b.csv").write_text("url,text\n,x\nhttp://a,b,c\n")
    assert [row.reason for row in addresses(str(tmp_path / "b.csv")) if isinstance(row, Bad)] == [
        "unreadable row: no url or image_url or img_url",
        "unreadable row: 3 cells under a header of 2",
    ]


def test_a_row_that_is_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LIMIT", 100)
    items, _ = split(list(parquet(written(tmp_path / "a.parquet", image=[bytes(101), bytes(100)]))))
    assert [(item.content, item.fault.partition(":")[0]) for item in items.values()] == [(None, "too large"), (bytes(100), "")]
