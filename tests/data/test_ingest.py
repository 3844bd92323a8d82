"""A heap becomes a table: every file is a row or is set aside, once, however often it is tried and whatever happens meanwhile."""

import hashlib
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from heaps import drawn, encoded, moving, mp4, tar, turned
from pyarrow import parquet as pq

from mezzotint.data import ingest as ingests
from mezzotint.data.ingest import Report, ingest, recognise
from mezzotint.data.rows import TableConfig
from mezzotint.data.survey import Bad
from mezzotint.data.table import Table, schema
from mezzotint.errors import UserError

FILES = {
    "a.png": encoded(drawn(mode="I;16")),
    "b.jpg": encoded(drawn(mode="CMYK"), "JPEG", exif=turned(6, "somebody")),
    "c.gif": moving("GIF"),
    "d.webp": encoded(drawn(), "WEBP"),
    "e.mp4": mp4(32, 16),
    "f.png": b"",
    "g.png": b"no picture",
    "h.png": encoded(drawn().resize((1, 1)).resize((9000, 9000))),
    "i.gif": encoded(drawn(mode="P"), "GIF"),
    "line\n.png": encoded(drawn(1)),
}


@pytest.fixture
def heap(tmp_path: Path) -> Path:
    folder = tmp_path / "heap"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "a.txt").write_text("one\ntwo")
    (folder / "notes.pdf").write_bytes(b"")
    return folder


def ids(table: Table) -> list[str]:
    return table.read(["id"])["id"].to_pylist()  # type: ignore[no-any-return]


def test_every_file_is_a_row_with_its_reason_or_set_aside(heap: Path, tmp_path: Path) -> None:
    table, report = ingest(str(heap), tmp_path / "t.lance")
    rows = {row["id"]: row for row in table.read(table.columns).to_pylist()}
    assert table.dataset.schema == schema()
    assert list(rows) == [*sorted(FILES)[:-1], "line%0A.png"]
    assert [rows["a.png"][key] for key in ("captions", "width", "height", "format", "media", "fault")] == [
        ["one", "two"],
        9,
        7,
        "PNG",
        "image",
        "",
    ]
    assert [rows["b.jpg"][key] for key in ("width", "height", "licence")] == [7, 9, "somebody"]
    assert [rows[id]["media"] for id in ("c.gif", "e.mp4", "i.gif")] == ["clip", "clip", "image"]
    assert (rows["e.mp4"]["width"], rows["e.mp4"]["format"]) == (32, "MP4")
    assert {id: row["fault"].partition(":")[0] for id, row in rows.items() if row["fault"]} == {
        "f.png": "empty file", "g.png": "not an image", "h.png": "too large",
    }  # fmt: skip
    for name, content in FILES.items():
        row = rows[name.replace("\n", "%0A")]
        assert row["content"] == content
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert row["source"] == str(heap)
    assert report.aside == [Bad("notes.pdf", "not an image or a clip, by its ending: '.pdf'")]
    assert (report.rows, report.known, dict(report.media)) == (10, 0, {"image": 8, "clip": 2})
    assert "1 empty file (first: 'f.png')" in str(report)
    assert not (tmp_path / "t.lance.part").exists()


def test_a_file_is_what_its_bytes_say_whatever_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "heap"
    folder.mkdir()
    named = {"JPEG": "a.png", "PNG": "b.jpg", "WEBP": "c.gif", "GIF": "d.webp"}
    for kind, name in named.items():
        (folder / name).write_bytes(encoded(drawn(len(name), mode="P" if kind == "GIF" else "RGB"), kind))
    table, _ = ingest(str(folder), tmp_path / "t.lance")
    rows = table.read(["id", "format", "fault", "media"]).to_pylist()
    assert {row["format"]: row["id"] for row in rows} == named
    assert all(row["fault"] == "" and row["media"] == "image" for row in rows)
    assert TableConfig(str(table.path), size=8, held_out=0.0).build().batch(0, 8).images.shape == (8, 3, 8, 8)


def test_the_same_again_adds_what_is_new_and_nothing_else(heap: Path, tmp_path: Path) -> None:
    first, _ = ingest(str(heap), tmp_path / "t.lance")
    again, report = ingest(str(heap), tmp_path / "t.lance")
    assert (again.version, report.rows, report.known) == (first.version, 0, 10)
    (heap / "new.png").write_bytes(FILES["a.png"])
    tar(tmp_path / "x.tar", {"1.png": FILES["a.png"], "1.txt": b"from a tar", "2/1.png": FILES["d.webp"]})
    _, report = ingest(str(heap), tmp_path / "t.lance")
    assert (report.rows, report.known) == (1, 10)
    fourth, report = ingest(str(tmp_path / "x.tar"), tmp_path / "t.lance")
    assert (report.rows, report.known, report.kind) == (2, 0, "tars")
    assert ids(fourth) == [*ids(first), "new.png", "x.tar/1.png", "x.tar/2/1.png"]
    assert ids(Table.open(tmp_path / "t.lance", first.version)) == ids(first)


def test_a_second_item_of_an_id_is_set_aside(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"1.png": FILES["a.png"], "2.png": FILES["a.png"]})
    with tarfile.open(path, "a") as file:
        file.addfile(tarfile.TarInfo("1.png"))
    table, report = ingest(str(path), tmp_path / "t.lance")
    assert ids(table) == ["x.tar/1.png", "x.tar/2.png"]
    assert report.aside == [Bad("x.tar/1.png", "a second item of this id")]


def test_batches_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingests, "BYTES", 1000)
    sizes = [400, 400, 400, 2000, 100, 3000, 100]  # the last but one is above the limit
    pq.write_table(pa.table({"bytes": [bytes(size) for size in sizes]}), tmp_path / "a.parquet")
    items = list(ingests.READERS["parquet"](str(tmp_path / "a.parquet")))
    groups = list(ingests._groups((item for item in items if not isinstance(item, Bad)), limit=2500))
    assert [[item.size for item in group] for group in groups] == [[400, 400], [400], [2000], [100, 3000, 100]]
    report = Report("", "parquet")
    batches = list(ingests._batches((item for item in items if not isinstance(item, Bad)), report, 2500, None))
    assert [len(content) if content else None for batch in batches for content in batch["content"].to_pylist()] == [*sizes[:5], None, 100]
    assert report.faults == {"not an image": 6, "too large": 1}


MANY = """
import sys
from mezzotint.data import ingest
from mezzotint.data.sources import Item
count = int(sys.argv[1])
noise = bytes(range(256)) * 4096
ingest.READERS["folder"] = lambda source: (Item(str(k), noise[k % 256 :] + noise[: k % 256], source) for k in range(count))
ingest.BYTES = 1 << 23
table, report = ingest.ingest(sys.argv[2], sys.argv[3])
assert report.rows == count
status = dict(line.split(":") for line in open("/proc/self/status") if line.count(":") == 1)
print(int(status["VmHWM"].split()[0]) // 1024)  # getrusage would tell that of the parent
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_memory_is_that_of_batches_and_not_of_the_source(heap: Path, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        arguments = [sys.executable, "-c", MANY, str(count), str(heap), str(tmp_path / f"{count}.lance")]
        return int(subprocess.run(arguments, check=True, capture_output=True, timeout=120).stdout)

    assert peak(300) - peak(30) < 100  # of 270 MB


KILLED = """
import sys, time
from mezzotint.data import ingest
ingest.BYTES = 1
read = ingest.as_row
def slow(item, limit):
    time.sleep(0.05)
    return read(item, limit)
ingest.as_row = slow
ingest.ingest(sys.argv[1], sys.argv[2], progress=lambda what, count: print(count, flush=True))
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_ingest_loses_nothing_and_doubles_nothing(heap: Path, tmp_path: Path, there: bool) -> None:
    out = tmp_path / "t.lance"
    if there:
        tar(tmp_path / "x.tar", {"1.png": FILES["a.png"]})
        before, _ = ingest(str(tmp_path / "x.tar"), out)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(heap), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 4:
        pass
    with pytest.raises(UserError, match="another run is at work"):
        ingest(str(heap), out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if there:
        assert ids(Table.open(out)) == ids(before)
    else:
        assert not out.exists()
    table, report = ingest(str(heap), out)
    assert (report.rows, report.known) == (10, 0)
    assert len(set(ids(table))) == len(ids(table)) == 10 + there
    assert not (tmp_path / "t.lance.part").exists()


def test_kinds_of_sources_are_recognised(heap: Path, tmp_path: Path) -> None:
    assert recognise(str(heap)) == "folder"
    (tmp_path / "k" / "10_dog").mkdir(parents=True)
    assert recognise(str(tmp_path / "k")) == "kohya"
    (tmp_path / "k" / "1.png").write_bytes(b"")
    assert recognise(str(tmp_path / "k")) == "folder"
    assert recognise(str(tar(tmp_path / "x.tar", {}))) == "tars"
    (tmp_path / "list.txt").write_text("http://a")
    assert recognise(str(tmp_path / "list.txt")) == "addresses"
    for wrong, message in (
        (heap / "a.png", "give the folder that holds it"),
        (heap / "notes.pdf", "is no source"),
        (heap / "nothing", "there is no file or folder"),
        (ingest(str(heap), tmp_path / "t.lance")[0].path, "is a table already"),
    ):
        with pytest.raises(UserError, match=message):
            recognise(str(wrong))


def test_what_cannot_be_ingested_is_one_line_and_leaves_nothing(heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingests, "ROWS", 1)
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"image": [FILES["a.png"]]}), tmp_path / "empty" / "a.parquet")
    pq.write_table(pa.table({"image": [1]}), tmp_path / "empty" / "b.parquet")
    before = sorted(tmp_path.iterdir())
    for source, out, message in (
        (tmp_path / "empty", tmp_path / "t.lance", "column 'image' of 'b.parquet' is int64"),  # after rows were written
        (heap, heap, "is there already and is no table"),
        (heap, tmp_path / "heap" / "a.png" / "t.lance", "cannot write to"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ingest(str(source), out)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before
    for file in (tmp_path / "empty").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no image or clip in"):
        ingest(str(tmp_path / "empty"), tmp_path / "t.lance")


def test_the_caller_is_told_how_far_it_is(heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingests, "ROWS", 4)
    seen: list[tuple[str, int]] = []
    ingest(str(heap), tmp_path / "t.lance", progress=lambda what, count: seen.append((what, count)))
    assert seen == [("rows", 4), ("rows", 8), ("rows", 10)]
