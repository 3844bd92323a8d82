"""The page on which a person looks at the data: what is on it is what is in the table."""

import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mezzotint.curation.cuts import Cut, judge
from mezzotint.curation.look import histogram, inspect, render
from mezzotint.data import table as tables
from mezzotint.data.table import Table
from mezzotint.errors import UserError


def rows(count: int) -> Iterator[pa.RecordBatch]:
    draw = random.Random(0)
    data = []
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 12, 3), draw.randrange(256), np.uint8)).save(file, "PNG")
        plain = {"media": "image", "width": 12, "height": 8, "format": "PNG", "sha256": "", "source": "here", "fault": ""}
        data.append({"id": f"<{i}>", "content": file.getvalue(), "captions": [f"number {i} & more"], **plain})
    data[3] |= {"content": None, "fault": "empty file"}
    yield pa.RecordBatch.from_pylist(data, schema=tables.schema())


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table.create(tmp_path / "t.lance", rows(20))
    scores = pa.table({"score": [float(i) for i in range(20)], "duplicate_of": ["<0>" if i in (4, 5) else None for i in range(20)]})
    table = table.with_columns(scores, {"stage": "a test"})
    return judge(table, [Cut("score", least=10.0), Cut("duplicate_of", empty=True)])


def test_the_funnel_has_every_row(table: Table) -> None:
    page = render(table)
    counts = {name: (int(out), int(left)) for name, out, left in re.findall(r'row">(\w+)</th><td>(\d+)</td><td>(\d+)</td>', page)}
    assert counts["fault"] == (1, 19)
    assert counts["score"] == (9, 10)
    assert counts["duplicate_of"] == (0, 10)
    assert "<td>10</td>" in page


def test_both_sides_of_a_threshold_are_shown(table: Table) -> None:
    page = render(table, picks=4)
    shown = re.findall(r"<figcaption>([\d.]+) (&lt;|≥) 10.0</figcaption>", page)
    assert [float(value) for value, _ in shown] == [8.0, 9.0, 10.0, 11.0]


def test_duplicates_stand_behind_the_row_that_is_kept(table: Table) -> None:
    part = render(table).partition("<h2>Duplicates</h2>")[2].partition("</section>")[0]
    assert re.findall(r'title="([^"]*)"', part) == ["&lt;0&gt;", "&lt;4&gt;", "&lt;5&gt;"]


def test_the_page_needs_nothing_else_and_is_the_same_again(table: Table) -> None:
    page = render(table)
    assert page == render(table)
    assert page != render(table, seed=1)
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"<\d+>", page)


def test_a_table_without_verdicts_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mezzotint data curate"):
        render(Table.create(tmp_path / "raw.lance", rows(5)))


def test_wild_values_do_not_flatten_a_histogram() -> None:
    bars = re.findall(r'x="([\d.]+)"[^>]*height="([\d.]+)"', histogram([*np.linspace(0, 1, 1000), 1e9], [0.5], "value"))
    assert len(bars) > 30


def test_a_row_is_found_by_id_and_by_number(table: Table) -> None:
    assert inspect(table, "<7>") == inspect(table, "7")
    assert inspect(table, "7")["score"] == 7.0
    with pytest.raises(UserError, match="did you mean '<7>'"):
        inspect(table, "<77>")
