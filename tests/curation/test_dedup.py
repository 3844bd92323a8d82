"""Duplicates are found, other pictures are not, and the right one stays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawn import BENCH, Row, make, photo, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mezzotint.curation import near
from mezzotint.curation.dedup import Duplicates, Keep, Perceptual, Semantic, clusters, contamination, dedup
from mezzotint.curation.hashes import BYTES, Fingerprints, alike, fingerprint, mirrored, mirrored_sketches, sketches, windows
from mezzotint.curation.near import Cells, pairs
from mezzotint.curation.stage import run
from mezzotint.data import table as tables
from mezzotint.data.table import Table

ORIGINALS = 6
CHANGES: dict[str, Any] = BENCH["TRANSFORMATIONS"]
Pair = tuple[str, str]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Originals with a copy by each transformation, among others, with fingerprints."""
    rows = [Row(f"{k}/", png(photo(k))) for k in range(ORIGINALS + 20)]
    for k in range(ORIGINALS):
        g = np.random.default_rng(k)
        rows += [Row(f"{k}/{name}", png(change(photo(k), g))) for name, change in CHANGES.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROWS", 32)
        table = make(tmp_path_factory.mktemp("planted") / "t.lance", rows)
    assert len(table.fragments) == 3
    return run(table, Fingerprints(), workers=1)


@pytest.fixture(scope="module")
def reported(planted: Table) -> set[Pair]:
    names = planted.read(["id"])["id"].to_pylist()
    return {(names[a], names[b]) for a, b in np.sort(pairs(planted, Perceptual(), workers=1), axis=1).tolist()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_is_found(reported: set[Pair], name: str) -> None:
    assert sum((f"{k}/", f"{k}/{name}") in reported for k in range(ORIGINALS)) >= ORIGINALS - (name == "15% darker or brighter")


def test_other_pictures_are_not(reported: set[Pair]) -> None:
    assert [(a, b) for a, b in reported if a.split("/")[0] != b.split("/")[0]] == []


def test_mirrored_pictures_may_be_told_apart(planted: Table) -> None:
    names = planted.read(["id"])["id"].to_pylist()
    found = {(names[a], names[b]) for a, b in np.sort(pairs(planted, Perceptual(mirror=False), workers=1), axis=1).tolist()}
    assert ("0/", "0/half the size") in found
    assert not any(a.endswith("mirrored") != b.endswith("mirrored") for a, b in found)


def test_icons_that_differ_in_one_sign_are_not_the_same(tmp_path: Path) -> None:
    rows = [Row(str(k), png(BENCH["icon"](k, 64))) for k in range(60)]
    table = run(make(tmp_path / "t.lance", rows), Fingerprints(), workers=1)
    assert len(pairs(table, Perceptual(), workers=1)) == 0


def test_of_drawings_whole_copies_are_the_same_and_another_sign_is_not(tmp_path: Path) -> None:
    """Also two signs that windows laid over each other take for one: a pentagon and a heptagon, a disc and a hexagon."""
    icons = {str(k): BENCH["icon"](k, 96) for k in range(120)}
    g = np.random.default_rng(0)
    kinds = ("half the size", "double the size", "WebP of quality 30")
    copies = {f"{k}/{kind}": CHANGES[kind](icons[str(k)], g) for k in range(6) for kind in kinds}
    table = make(tmp_path / "t.lance", [Row(name, png(image)) for name, image in {**icons, **copies}.items()])
    names = [*icons, *copies]
    found = pairs(run(table, Fingerprints(), workers=1), Perceptual(crops=False), workers=1)
    reported = {(names[min(a, b)], names[max(a, b)]) for a, b in found.tolist()}
    assert {(name.split("/")[0], name) for name in copies} <= reported
    assert all(a.split("/")[0] == b.split("/")[0] for a, b in reported)


def prints(images: Sequence[Image.Image]) -> Any:
    return np.frombuffer(b"".join(map(fingerprint, images)), np.uint8).reshape(-1, BYTES)


@given(st.lists(st.floats(0, 0.1), min_size=4, max_size=4), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_any_small_crop_is_within_reach(shares: list[float], seed: int) -> None:
    whole, part = prints([photo(seed)]), prints([BENCH["cropped"](photo(seed), shares)])
    cosine = sketches(whole)[0] @ sketches(part, whole=True)[0, 0]
    assert cosine.max() > Perceptual.least
    assert alike(whole, part, windows()[cosine.argmax(keepdims=True)]).all()


def test_a_mirrored_sketch_is_that_of_the_mirrored_picture() -> None:
    one = prints([photo(0)])
    np.testing.assert_array_equal(mirrored(mirrored(one)), one)
    of_mirrored = sketches(mirrored(one))[0]
    turned = [np.flatnonzero((windows() == cut[[1, 0, 2, 3]]).all(1))[0] for cut in windows()]
    np.testing.assert_allclose(mirrored_sketches(sketches(one))[0][turned], of_mirrored, atol=1e-5)


def test_flat_pictures_have_no_sketch() -> None:
    assert not sketches(prints([Image.new("RGB", (9, 9), colour) for colour in ("white", "red")])).any()


def test_no_pictures_have_no_sketches() -> None:
    assert sketches(np.zeros((0, BYTES), np.uint8)).shape == (0, 16, 55)


# Clusters.


@given(st.integers(1, 30), st.data())
@settings(max_examples=60, deadline=None)
def test_clusters_are_what_pairs_connect(count: int, data: st.DataObject) -> None:
    row = st.integers(0, count - 1)
    same = data.draw(st.lists(st.tuples(row, row), max_size=40))
    reach = np.eye(count, dtype=bool)
    for a, b in same:
        reach[a, b] = reach[b, a] = True
    for _ in range(count):
        reach = reach | (reach @ reach)
    np.testing.assert_array_equal(clusters(count, np.array(same, np.int64).reshape(-1, 2)), reach.argmax(1))


def columns(table: Table) -> dict[str, tuple[int, str | None]]:
    found = table.read(["id", "cluster", "duplicate_of"]).to_pydict()
    return dict(zip(found["id"], zip(found["cluster"], found["duplicate_of"], strict=True), strict=True))


def test_the_best_of_a_cluster_stays(tmp_path: Path) -> None:
    one, large, two, three, alone = (png(photo(k)) for k in (0, 0, 1, 2, 3))
    small = png(photo(0).resize((48, 36)))
    rows = [
        Row("small", small, ["a long caption of a small picture"], size=(48, 36)),
        Row("large", large, size=(96, 72)),
        Row("broken but large", one, size=(999, 999), fault="too large"),
        Row("said in two words", two, ["two words"]),
        Row("said in more words", two, ["a", "more than two words"]),
        Row("tie b", three, ["same"]),
        Row("tie a", three, ["same"]),
        Row("alone", alone),
    ]
    table = dedup(make(tmp_path / "t.lance", rows), Duplicates(), workers=1)
    assert columns(table) == {
        "small": (0, "large"),
        "large": (0, None),
        "broken but large": (0, "large"),
        "said in two words": (3, "said in more words"),
        "said in more words": (3, None),
        "tie b": (5, "tie a"),
        "tie a": (5, None),
        "alone": (7, None),
    }
    assert dedup(table, Duplicates(), workers=1).version == table.version
    by_caption = dedup(table, Duplicates(keep=Keep(("caption", "area"))), workers=1)
    assert columns(by_caption)["large"] == (0, "small")


def test_rows_that_cannot_be_read_are_nobodys_duplicates(tmp_path: Path) -> None:
    rows = [
        Row("nothing", None, fault="no permission to read"),
        Row("nothing too", None, fault="no permission to read"),
        Row("junk", b"junk", fault="not an image"),
        Row("empty", b"", fault="empty file"),
        Row("white", png(Image.new("RGB", (8, 8), "white"))),
        Row("other white", png(Image.new("RGB", (9, 9), "white"))),
        Row("cut off", png(photo(0))[:-300]),
    ]
    table = dedup(make(tmp_path / "t.lance", rows), Duplicates(), workers=1)
    assert [of for _, of in columns(table).values()] == [None] * len(rows)
    assert len({cluster for cluster, _ in columns(table).values()}) == len(rows)


def test_a_table_without_rows(tmp_path: Path) -> None:
    table = dedup(make(tmp_path / "t.lance", []), Duplicates(semantic=None), workers=1)
    assert len(table) == 0
    assert {"cluster", "duplicate_of"} <= set(table.columns)
    assert "contaminates" in contamination(table, table, Duplicates(), workers=1).columns


def test_contamination_names_what_it_is_a_copy_of(tmp_path: Path) -> None:
    evaluation = make(tmp_path / "e.lance", [Row("e0", png(photo(0))), Row("e1", png(photo(1))), Row("e1 again", png(photo(1)))])
    rows = [
        Row("clean", png(photo(5))),
        Row("bytes", png(photo(1))),
        Row("mirrored", png(ImageOps.mirror(photo(0)))),
        Row("cropped", png(BENCH["cropped"](photo(0), [0.06, 0.0, 0.02, 0.09]))),
        Row("cropped again", png(BENCH["cropped"](photo(0), [0.06, 0.0, 0.02, 0.09]))),
        Row("nothing", None, fault="gone"),
    ]
    table = contamination(make(tmp_path / "t.lance", rows), evaluation, Duplicates(), workers=1)
    assert table.read(["contaminates"])["contaminates"].to_pylist() == [None, "e1", "e0", "e0", "e0", None]
    again = contamination(table, evaluation.latest, Duplicates(), workers=1)
    assert again.version == table.version


# The search.


@given(st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_cells_find_nearly_all_that_is_near(seed: int) -> None:
    g = np.random.default_rng(seed)
    vectors = g.standard_normal((600, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    probes = vectors + 0.06 * g.standard_normal(vectors.shape).astype(np.float32)
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "EXACT", 100)
        found = set(zip(*(x.tolist() for x in Cells(vectors).near(probes, 0.8)[:2]), strict=True))
    exact = set(zip(*(x.tolist() for x in np.nonzero(probes @ vectors.T > 0.8)), strict=True))
    assert found <= exact | {(a, b) for a, b in found if abs(probes[a] @ vectors[b] - 0.8) < 1e-3}  # half precision
    assert len(found & exact) > 0.95 * len(exact)


def test_a_row_with_very_many_copies_is_looked_at_a_bounded_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST", 4)
    rows = [Row(str(k), png(BENCH["compressed"](photo(0), "JPEG", 40 + k))) for k in range(30)]
    table = run(make(tmp_path / "t.lance", rows), Fingerprints(), workers=1)
    found = pairs(table, Perceptual(), workers=1)
    assert len(found) <= 4 * 30 + 30
    assert len(set(clusters(30, found).tolist())) == 1


def test_embeddings_of_one_direction_are_one(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    vectors = g.standard_normal((40, 96)).astype(np.float16)
    vectors[7] = 3 * vectors[3] + 0.1 * g.standard_normal(96)
    vectors[9] = vectors[3] + 0.5 * g.standard_normal(96)  # a cosine of about 0.9
    table = make(tmp_path / "t.lance", [Row(f"{k:02}", f"{k}".encode()) for k in range(40)])
    given = [None if k in (5, 6) else vector.tolist() for k, vector in enumerate(vectors)]
    embedding = pa.table({"embedding": pa.array(given, pa.list_(pa.float16(), 96))})
    table = table.with_columns(embedding, {"stage": {"kind": "given"}})
    found = dedup(table, Duplicates(perceptual=None, semantic=Semantic(0.97)), workers=1)
    assert {name: of for name, (_, of) in columns(found).items() if of} == {"07": "03"}
    loose = dedup(table.latest, Duplicates(perceptual=None, semantic=Semantic(0.8)), workers=1)
    assert {name: of for name, (_, of) in columns(loose).items() if of} == {"07": "03", "09": "03"}


def test_a_cosine_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"cosine must be between 0\.5 and 1, got 95"):
        Semantic(95)
