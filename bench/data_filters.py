"""Precision and recall of each filter on pictures with planted dirt, and how many clean ones the whole recipe loses.

A filter is a cut of the recipe; it should take out the rows of the kinds of dirt that are its own, and no clean row. Of all rows that
its cut alone takes out, `precision` is the share that are not clean: other dirt may also be beyond its threshold. `recall` is the share of
its own dirt that it takes out, `lost` the share of clean rows. Of a picture and its copies one stays, whichever: `recall` of copies is the
share that are in one cluster with their original, and a row is taken out rightly if what stays for it shows the same picture.

    python bench/data_filters.py [--data DIR] [--only photos] [--clean 300] [--each 40]

--data: a folder with metadata.jsonl, under the recipe `pixels`; without it, drawn photo-like pictures and Worlds renders under `photos`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mezzotint.curation.cuts import FIRST, Curation, Cut, curate, funnel
from mezzotint.data.table import Table
from mezzotint.recipes.curation import photos, pixels

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "curation"))

import dirty

OWN = {  # the dirt that each cut is there for
    "decode_fault": ("truncated", "flipped", "flipped_jpeg"),
    "short_side": ("tiny",),
    "aspect": ("narrow",),
    "entropy": ("flat",),
    "flatness": ("flat",),
    "contrast": ("flat",),
    "sharpness": ("blur",),
    "edge": ("blur",),
    "tiling": ("watermark",),
    "text_area": ("text", "watermark"),
    "nsfw": (),
}


def measured(table: Table, cut: Cut, dirt: Sequence[str]) -> dict[str, float]:
    """One filter by itself."""
    fails = np.concatenate([cut.fails(batch[cut.column]) for batch in table.batches([cut.column])])
    kinds = np.array(dirt)
    result = {"taken": int(fails.sum()), "lost": float(fails[kinds == ""].mean())}
    if fails.any():
        result["precision"] = float((kinds[fails] != "").mean())
    return result | {f"recall.{kind}": float(fails[kinds == kind].mean()) for kind in OWN[cut.column] if kind in dirt}


def duplicated(table: Table, samples: Sequence[dirty.Sample]) -> dict[str, float]:
    """The same of duplicates."""
    found = table.read(["cluster", "duplicate_of"]).to_pylist()
    picture = {sample.id: sample.of or sample.id for sample in samples}
    cluster = {sample.id: row["cluster"] for sample, row in zip(samples, found, strict=True)}
    right = {s.id: picture[row["duplicate_of"]] == picture[s.id] for s, row in zip(samples, found, strict=True) if row["duplicate_of"]}
    clean = [sample.id for sample in samples if not sample.dirt]
    copies = {kind: [s for s in samples if s.dirt == kind] for kind in (dirty.EXACT, *dirty.COPIES)}
    result = {"taken": len(right), "lost": float(np.mean([not right.get(name, True) for name in clean]))}
    result |= {"precision": float(np.mean(list(right.values())))} if right else {}
    return result | {f"recall.{kind}": float(np.mean([cluster[s.id] == cluster[s.of] for s in those])) for kind, those in copies.items()}


def report(samples: Sequence[dirty.Sample], recipe: Curation) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        table = curate(Table.create(f"{folder}/t.lance", dirty.rows(samples)), recipe, workers=1)
        verdicts = np.array(table.read(["verdict"])["verdict"].to_pylist())
        dirt = [sample.dirt for sample in samples]
        used = [cut for cut in (*FIRST, *recipe.cuts) if cut.column in table.columns and cut.column in OWN]
        filters = {cut.column: measured(table, cut, dirt) for cut in used} | {"duplicate_of": duplicated(table, samples)}
        lost = {kind or "clean": float((verdicts[np.array(dirt) == kind] != "").mean()) for kind in dict.fromkeys(dirt)}
        return {"rows": len(samples), "filters": filters, "taken_by_kind": lost, "funnel": funnel(table), "skipped": recipe.skipped()}


def shown(name: str, result: dict[str, object]) -> str:
    """The filters of a report as a Markdown table."""
    lines = [f"{name}: {result['rows']} rows", "", "| filter | recall | precision | clean rows lost |", "|---|---|---|---|"]
    for column, values in result["filters"].items():  # type: ignore[attr-defined]
        recalls = ", ".join(f"{key.removeprefix('recall.')} {value:.2f}" for key, value in values.items() if key.startswith("recall."))
        lines.append(f"| `{column}` | {recalls or '-'} | {values.get('precision', float('nan')):.2f} | {values['lost']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", choices=("photos", "worlds"))
    parser.add_argument("--clean", type=int, default=300)
    parser.add_argument("--each", type=int, default=40)
    options = parser.parse_args()
    results = {}
    sources: dict[str, tuple[Callable[[int], list[dirty.Sample]], Callable[[], Curation]]]
    sources = {"photos": (dirty.photos, photos), "worlds": (dirty.worlds, photos)}
    if options.data:
        sources = {"pixels": (partial(dirty.emoji, options.data), pixels)}
    for name, (clean, recipe) in sources.items():
        if options.only not in (None, name):
            continue
        results[name] = report(dirty.dirty(clean(options.clean), options.each), recipe())
        print(shown(name, results[name]), end="\n\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
