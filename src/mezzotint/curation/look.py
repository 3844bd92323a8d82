"""Where it fits: the page on which a person looks at the data, and at what was done to them.

In: a table whose rows have a `verdict`. Out: one HTML page that needs nothing but itself: how many rows were left out and why, pictures
that each filter left out, and those that stand just on either side of its threshold, distributions, duplicates, captions, shapes.
Gotchas: pictures are drawn at random, but the same for the same table and seed. Small columns are read whole, pictures only where shown.
"""

import base64
import io
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from mezzotint.config import Config
from mezzotint.curation.cuts import VERDICT, Cut, funnel, rule
from mezzotint.data.decode import UnusableError, decode
from mezzotint.data.table import Table
from mezzotint.errors import unknown
from mezzotint.evals.report import (
    BOTTOM,
    CHART_HEIGHT,
    CHART_WIDTH,
    LEFT,
    PLOT_HEIGHT,
    PLOT_WIDTH,
    RIGHT,
    TOP,
    number,
    page,
    tick_label,
    tick_spacing,
    ticks,
)

KEPT = rule("")
SIDE = 112  # pixels of a picture here
BINS = 40
CLUSTERS = 10  # groups of duplicates that are shown
PATCH = 16  # pixels a side of a token, as most latent transformers have it


def render(table: Table, picks: int = 8, seed: int = 0) -> str:
    """The page. picks: pictures for each question."""
    show = _Show(table, random.Random(seed), picks)
    counts = funnel(table)
    verdicts = table.read([VERDICT])[VERDICT].to_pylist()
    facts = {"table": str(table.path), "version": str(table.version), "rows": f"{len(table):,}", "kept": f"{counts['kept']:,}"}
    sections = [_funnel(counts), *(_filter(show, column, bounds, verdicts) for column, bounds in _bounds(table).items())]
    sections += [_duplicates(show), _captions(show, verdicts), _shapes(table, verdicts)]
    return page(f"The data of {table.path.stem}", facts, sections)


class _Show:
    """Pictures of a table as HTML."""

    def __init__(self, table: Table, draw: random.Random, picks: int) -> None:
        self.table, self.draw, self.picks = table, draw, picks

    def some(self, rows: Sequence[int]) -> list[int]:
        """A few of these rows, in their order."""
        return sorted(self.draw.sample(rows, min(self.picks, len(rows))))

    def row(self, rows: Sequence[int], words: Sequence[str]) -> str:
        """Pictures side by side, each with a line under it."""
        contents = self.table.take(rows, ["content", "id"]).to_pylist()
        figures = (_figure(found["content"], found["id"], line) for found, line in zip(contents, words, strict=True))
        return f'<div class="row">{"".join(figures)}</div>'


def _figure(content: bytes | None, name: str, line: str) -> str:
    try:
        picture = decode(content) if content else None
    except UnusableError:
        picture = None
    caption = f"<figcaption>{escape(line)}</figcaption>"
    if picture is None:
        return f'<figure style="width:{SIDE}px" title="{escape(name)}"><p class="soft">no picture</p>{caption}</figure>'
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}"'
    image = f'<img {size} alt="{escape(name)}" title="{escape(name)}" src="data:image/jpeg;base64,{data}">'
    return f'<figure style="width:{SIDE}px">{image}{caption}</figure>'


def _bounds(table: Table) -> dict[str, list[float]]:
    """The columns that verdicts come from, in order, with the thresholds on each; none where only what is there counts."""
    bounds: dict[str, list[float]] = {}
    for data in (table.stamp(VERDICT) or {})["cuts"]:
        cut = Config.from_data(data)
        assert isinstance(cut, Cut)
        bounds.setdefault(cut.column, []).extend(bound for bound in (cut.least, cut.most) if bound is not None)
    return bounds


def _funnel(counts: dict[str, int]) -> str:
    total = left = sum(counts.values())
    rows = []
    for reason, count in counts.items():
        if reason != KEPT:
            left -= count
            rows.append((reason, count, left))
    cells = "\n".join(
        f'<tr><th scope="row">{escape(reason)}</th><td>{count:,}</td><td>{left:,}</td><td>{_bar(left / max(1, total))}</td></tr>'
        for reason, count, left in rows
    )
    return f"""<section>
<h2>What was left out</h2>
<table class="scores">
<thead><tr><th scope="col">reason</th><th scope="col">left out</th><th scope="col">remain</th><th scope="col">of {total:,}</th></tr></thead>
<tbody>
{cells}
</tbody>
</table>
</section>"""


def _bar(share: float) -> str:
    return f'<svg viewBox="0 0 100 10" width="160" height="12" role="img" aria-label="{share:.1%}">{_rect(0, 0, 100 * share, 10)}</svg>'


def _rect(x: float, y: float, width: float, height: float) -> str:
    return f'<rect fill="var(--train)" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}"/>'


def _filter(show: _Show, column: str, bounds: Sequence[float], verdicts: Sequence[str]) -> str:
    """What the cuts of one column did: its distribution, what they left out, and the closest on both sides of each threshold."""
    out = [row for row, verdict in enumerate(verdicts) if verdict and rule(verdict) == column]
    if not out and not bounds:
        return ""
    chosen = show.some(out)
    parts = [
        f"<h2>{escape(column)}</h2>",
        f"<h3>{len(out):,} left out, some at random</h3>",
        show.row(chosen, [verdicts[row] for row in chosen]),
    ]
    values = show.table.read([column])[column].to_pylist() if bounds else []
    measured = [(row, float(value)) for row, value in enumerate(values) if value is not None and math.isfinite(value)]
    if measured:
        parts.insert(1, _card(histogram([value for _, value in measured], bounds, column)))
    for bound in bounds if measured else ():
        near = _nearest(measured, bound, max(1, show.picks // 2))
        lines = [f"{number(value)} {'<' if value < bound else '≥'} {number(bound)}" for _, value in near]
        parts += [f"<h3>just below and above {number(bound)}</h3>", show.row([row for row, _ in near], lines)]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _nearest(numbers: Sequence[tuple[int, float]], bound: float, most: int) -> list[tuple[int, float]]:
    """The rows whose values are closest to a bound, so many below it and so many above, by rising value."""
    ordered = sorted(numbers, key=lambda found: found[1])
    below = [found for found in ordered if found[1] < bound][-most:]
    return below + [found for found in ordered if found[1] >= bound][:most]


def _duplicates(show: _Show) -> str:
    """The largest groups of duplicates, each led by the row that is kept."""
    if "duplicate_of" not in show.table.columns:
        return ""
    columns = show.table.read(["id", "duplicate_of"]).to_pydict()
    groups: dict[str, list[int]] = defaultdict(list)
    for row, original in enumerate(columns["duplicate_of"]):
        if original is not None:
            groups[original].append(row)
    if not groups:
        return '<section>\n<h2>Duplicates</h2>\n<p class="soft">None.</p>\n</section>'
    at = {name: row for row, name in enumerate(columns["id"])}
    parts = []
    for original, rows in sorted(groups.items(), key=lambda group: -len(group[1]))[:CLUSTERS]:
        shown = [at[original], *rows[: show.picks - 1]]
        parts.append(show.row(shown, ["kept", *(columns["id"][row] for row in shown[1:])]))
    heading = f"<h2>Duplicates</h2>\n<p>{sum(map(len, groups.values())):,} rows in {len(groups):,} groups; the largest:</p>"
    return "<section>\n" + heading + "\n".join(parts) + "\n</section>"


def _captions(show: _Show, verdicts: Sequence[str]) -> str:
    """Rows that are kept, at random, with all their captions, and how long captions are."""
    kinds = [name for name in show.table.columns if name.startswith("captions")]
    kept = [row for row, verdict in enumerate(verdicts) if not verdict]
    if not kept:
        return ""
    chosen = show.some(kept)
    found = show.table.take(chosen, kinds).to_pylist()
    lines = [" | ".join(caption for kind in kinds for caption in row[kind] or ()) or "no caption" for row in found]
    lengths = [float(len(caption.split())) for row in show.table.read(["captions"])["captions"].to_pylist() for caption in row or ()]
    chart = _card(histogram(lengths, (), "words of a caption")) if lengths else ""
    return f"<section>\n<h2>Captions</h2>\n{chart}\n{show.row(chosen, lines)}\n</section>"


def _shapes(table: Table, verdicts: Sequence[str]) -> str:
    """Aspects and sizes of what is kept."""
    sizes = table.read(["width", "height", "format"]).to_pylist()
    kept = [size for size, verdict in zip(sizes, verdicts, strict=True) if not verdict and size["width"] and size["height"]]
    if not kept:
        return ""
    aspects = [math.log2(size["width"] / size["height"]) for size in kept]
    tokens = [float(-(-size["width"] // PATCH) * -(-size["height"] // PATCH)) for size in kept]
    charts = [histogram(aspects, (), "log2 of width over height"), histogram(tokens, (), f"tokens of {PATCH} x {PATCH} pixels")]
    formats = ", ".join(f"{count:,} {name}" for name, count in Counter(size["format"] for size in kept).most_common())
    return f"<section>\n<h2>Shapes</h2>\n<p>{escape(formats)}</p>\n{_card(*charts)}\n</section>"


def _card(*charts: str) -> str:
    return f'<div class="cards">{"".join(f"<article>{chart}</article>" for chart in charts)}</div>'


def histogram(values: Sequence[float], bounds: Iterable[float], title: str) -> str:
    """Bars of how many values are how large, as an inline SVG, with a line at each bound.

    The outermost 1% on either side stand in the first and the last bar: a few wild values do not flatten the rest.
    """
    ordered, bounds = sorted(values), list(bounds)
    cut = len(ordered) // 100
    low, high = min([ordered[cut], *bounds]), max([ordered[-1 - cut], *bounds])
    high = high if high > low else low + 1.0
    counts = Counter(min(BINS - 1, max(0, int((value - low) / (high - low) * BINS))) for value in values)
    tallest, step = max(counts.values()), PLOT_WIDTH / BINS

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * PLOT_WIDTH

    parts = [
        _rect(LEFT + place * step, TOP + PLOT_HEIGHT * (1 - count / tallest), step - 0.5, PLOT_HEIGHT * count / tallest)
        for place, count in counts.items()
    ]
    bottom, spacing = TOP + PLOT_HEIGHT, tick_spacing((low, high), 5)
    for tick in ticks((low, high), spacing):
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick_label(tick, spacing)}</text>')
    for bound in bounds:
        parts.append(
            f'<line stroke="var(--held)" stroke-width="2" x1="{across(bound):.1f}" x2="{across(bound):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
    parts.append(f'<path class="axis" d="M{LEFT},{bottom}H{CHART_WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{tallest:,}</text>')
    parts.append(
        f'<text class="soft" x="{LEFT + PLOT_WIDTH / 2}" y="{CHART_HEIGHT - BOTTOM / 6:.0f}" text-anchor="middle">{escape(title)}</text>'
    )
    words = f"{title}: {len(values):,} values, the middle one {number(ordered[len(ordered) // 2])}"
    content = "\n".join(parts)
    return f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{escape(words)}">\n{content}\n</svg>'


def inspect(table: Table, name: str) -> dict[str, Any]:
    """One row, by its id or its number: all columns, bytes as their length."""
    names = table.read(["id"])["id"].to_pylist()
    if name in names:
        row = names.index(name)
    elif name.isdigit() and int(name) < len(names):
        row = int(name)
    else:
        raise unknown(f"row of {str(table.path)!r}", name, names)
    found = table.take([row], table.columns).to_pylist()[0]
    return {column: f"{len(value):,} bytes" if isinstance(value, bytes) else value for column, value in {"row": row, **found}.items()}
