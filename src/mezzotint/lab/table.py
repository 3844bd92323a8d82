"""What was measured of the techniques as a Markdown table, as JSON and as a plot: means over the seeds and their standard errors."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mezzotint.evals.report import Points, plot_svg

TABLE, DATA, PLOT = "table.md", "table.json", "plot.svg"
MEASURES = ("score", "heldout", "preference", "diversity")  # of tuned models
OWN = "4"  # network calls at which students are compared by cost and diversity

Measured = dict[str, Any]
Panel = tuple[str, str, Mapping[str, Points]]
Value = tuple[float, float | None]  # mean, and standard error where there is more than one seed


def over_seeds(values: Sequence[float]) -> Value:
    """Mean and standard error; one seed has none."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def shown(value: Value) -> str:
    """As it stands in the table, to a thousandth, or whole from a hundred on."""
    digits = 0 if abs(value[0]) >= 100 else 3
    return f"{value[0]:.{digits}f}" if value[1] is None else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def write(folder: Path, origins: Measured, found: dict[str, dict[str, list[Measured]]]) -> None:
    """Draw what was measured (`lab.methods.gathered`, and `Lab.origins`) into a folder."""
    students = {name: _student(runs) for name, runs in found["students"].items()}
    tuned = {name: {**_scores(runs), **_costs(runs)} for name, runs in found["tuned"].items()}
    texts = [_students_table(origins["teacher"], students)] if students else []
    texts += [_tuned_table(_scores([origins["base"]]), tuned)] if tuned else []
    (folder / TABLE).write_text("\n\n".join(texts) + "\n")
    data = {
        "models": origins["models"],
        "teacher": origins.get("teacher"),
        "base": origins.get("base"),
        "students": students,
        "tuned": tuned,
    }
    (folder / DATA).write_text(json.dumps(data, indent=2) + "\n")
    (folder / PLOT).write_text(plot_svg([*_students_panels(origins.get("teacher"), students), *_tuned_panels(origins.get("base"), tuned)]))


def _students_panels(teacher: Measured | None, students: dict[str, dict[str, Any]]) -> Iterator[Panel]:
    """Quality against calls, and at `OWN` calls against what it cost."""
    if teacher is None:
        return
    lines = {name: [(float(n), *_point(row["score"])) for n, row in it["calls"].items()] for name, it in students.items()}
    yield "network calls", "judge", {"teacher": [(float(n), row["score"], 0.0) for n, row in teacher["calls"].items()], **lines}
    for cost, words in (("seconds", "seconds of training"), ("samples", "training samples")):
        yield words, f"judge at {OWN} calls", {n: [(it[cost][0], *_point(it["calls"][OWN]["score"]))] for n, it in students.items()}


def _tuned_panels(base: Measured | None, tuned: dict[str, dict[str, Any]]) -> Iterator[Panel]:
    """Preference, and the judge's score, against diversity."""
    if base is None:
        return
    every = {"base": _scores([base]), **tuned}
    for measure, words in (("preference", "preference"), ("score", "judge")):
        yield "diversity", words, {name: [(it["diversity"][0], *_point(it[measure]))] for name, it in every.items()}


def _point(value: Value) -> tuple[float, float]:
    return value[0], value[1] or 0.0


def _costs(runs: Sequence[Measured]) -> dict[str, Any]:
    return {"seeds": len(runs), **{key: over_seeds([run[key] for run in runs]) for key in ("seconds", "samples")}}


def _student(runs: Sequence[Measured]) -> dict[str, Any]:
    """A student's numbers over its seeds: every measure at every number of calls, and the cost."""
    calls = {
        n: {measure: over_seeds([run["calls"][n][measure] for run in runs]) for measure in measures}
        for n, measures in runs[0]["calls"].items()
    }
    return {"calls": calls, **_costs(runs)}


def _scores(runs: Sequence[Measured]) -> dict[str, Value]:
    """A tuned model's numbers over its seeds."""
    return {measure: over_seeds([run[measure] for run in runs]) for measure in MEASURES}


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _students_table(teacher: Measured, students: dict[str, dict[str, Any]]) -> str:
    calls, own, sampling = list(teacher["calls"]), teacher["own"], teacher["sampling"]
    steps = f"{sampling['solver']} in {sampling['steps']} steps, guidance {sampling['guidance']:g}"
    title = (
        f"Students. Their teacher by {steps}: judge {own['score']:.3f}, diversity {own['diversity']:.3f}. Guided calls do twice the work."
    )
    heads = ["student", "seeds", *(f"judge, {n} calls" for n in calls), f"diversity, {OWN} calls", "seconds", "samples"]
    few = [f"{teacher['calls'][n]['score']:.3f}" for n in calls]
    rows = [["(teacher)", "", *few, f"{teacher['calls'][OWN]['diversity']:.3f}", "", ""]]
    for name, it in students.items():
        scores, costs = [shown(it["calls"][n]["score"]) for n in calls], [shown(it[key]) for key in ("seconds", "samples")]
        rows.append([f"`{name}`", str(it["seeds"]), *scores, shown(it["calls"][OWN]["diversity"]), *costs])
    return f"{title}\n\n{_rows(heads, rows)}"


def _tuned_table(base: dict[str, Value], tuned: dict[str, dict[str, Any]]) -> str:
    heads = ["tuned by", "seeds", "judge", "judge, held out", "preference", "diversity", "seconds", "samples"]
    rows = [["(base)", "", *(shown(base[key]) for key in MEASURES), "", ""]]
    rows += [[f"`{n}`", str(it["seeds"]), *(shown(it[key]) for key in (*MEASURES, "seconds", "samples"))] for n, it in tuned.items()]
    return f"Tuned models.\n\n{_rows(heads, rows)}"
