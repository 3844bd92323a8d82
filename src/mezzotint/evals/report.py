"""Where it fits: the end of a run, or of several in a row, as one page that can be opened anywhere and kept.

In: `render`, from plain data (scores, curves, pictures, facts) to an HTML page that needs nothing but itself; `curve_svg`; `plot_svg`,
measured points of several things as a file of its own.
Out: measuring (`evals`), making PNG bytes (`pictures`), writing the file.
Gotchas: every text is escaped here, so callers hand over plain text. The page forbids the browser to load anything.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate

from PIL import Image, UnidentifiedImageError

Curve = Sequence[tuple[int, float]]  # (step, loss), by rising step
Points = Sequence[tuple[float, float, float]]  # (where, mean, standard error)

PAGE_WIDTH = 1144  # CSS pixels, shared by the pictures of one prompt,
PICTURE_GAP = 12  # with this much between them;
PICTURE_WIDTHS = 96, 256  # each is given at least and at most so much, in more than one row if need be
MOST_POINTS = 400  # of one line in a chart: more than it has pixels only makes the page heavy
SMOOTHING = 20  # a smoothed curve is a running mean over 1/SMOOTHING of it
CHART_WIDTH, CHART_HEIGHT = 360, 220
DOT = 2.5  # radius
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 38  # the chart's margins around its plot
PLOT_WIDTH, PLOT_HEIGHT = CHART_WIDTH - LEFT - RIGHT, CHART_HEIGHT - TOP - BOTTOM
KEY_WIDTH, KEY_LINE = 150, 14  # beside a plot of several things, and from one name to the next


@dataclass
class Stage:
    """What one stage of a model's life left behind.

    name: what the recipe calls it. title: what a reader calls it.
    scores: become the columns of the table, in the order in which they are first seen.
    curve, held_out_curve: (step, loss) in training and on held-out data; empty for a stage that trains nothing.
    images: PNG files, one per prompt of the report, drawn with the same seeds in all stages; none for a stage that draws nothing.
    notes: whatever else is worth a line, by name. more: whatever else is worth a chart over the steps, by name.
    """

    name: str
    title: str
    scores: dict[str, float]
    curve: list[tuple[int, float]]
    held_out_curve: list[tuple[int, float]]
    images: list[bytes]
    notes: dict[str, str]
    more: dict[str, Curve] = field(default_factory=dict)


def render(title: str, stages: list[Stage], prompts: list[str], facts: dict[str, str]) -> str:
    """The report as one HTML page.

    Args: facts, what one must know to repeat the run: machine, versions, commit, command, total time.
    Raises: ValueError for a stage that has not one image per prompt, or an image that is no PNG file.
    """
    for stage in stages:
        if len(stage.images) not in (0, len(prompts)):
            raise ValueError(f"stage {stage.name!r} must have one image for each of {len(prompts)} prompts, got {len(stage.images)}")
    return page(title, facts, [_scores(stages), _stages(stages), _pictures(stages, prompts)])


def page(title: str, facts: dict[str, str], sections: list[str]) -> str:
    """A page of its own, of sections that are HTML already; all other text is plain."""
    content = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{_facts(facts)}
{content}
</main>
</body>
</html>
"""


def _facts(facts: dict[str, str]) -> str:
    rows = "\n".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(fact)}</td></tr>' for name, fact in facts.items())
    return f'<table class="facts">\n<tbody>\n{rows}\n</tbody>\n</table>' if facts else ""


def _scores(stages: list[Stage]) -> str:
    names = list(dict.fromkeys(name for stage in stages for name in stage.scores))
    if not names:
        return ""
    columns = [_score_cells([stage.scores.get(name) for stage in stages]) for name in names]
    heads = "".join(_score_heading(name) for name in names)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(stage.title)} <code>{escape(stage.name)}</code></th>{"".join(cells)}</tr>'
        for stage, *cells in zip(stages, *columns, strict=True)
    )
    return f"""<section>
<h2>Scores</h2>
<div class="wide" role="region" aria-label="Scores" tabindex="0">
<table class="scores">
<thead><tr><th scope="col">Stage</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</section>"""


def _score_heading(name: str) -> str:
    # Browsers also break lines after hyphens, which would tear "held-out" apart.
    unbroken = "" if " " in name else ' class="word"'
    return f'<th scope="col"{unbroken}>{escape(name)}</th>'


def _score_cells(values: list[float | None]) -> list[str]:
    """The cells of one column; None is a score that a stage does not have."""
    whole = all(value is None or not math.isfinite(value) or value == int(value) for value in values)
    cells = []
    for value in values:
        if value is None:
            cells.append('<td class="soft">–</td>')
        else:
            alarm = "" if math.isfinite(value) else ' class="alarm"'
            cells.append(f"<td{alarm}>{number(value, whole)}</td>")
    return cells


def number(value: float, whole: bool = False) -> str:
    """A number as short as it stays readable: 0.932, 12.3, 1234, 4.2e-05; without decimals where `whole`; nan and inf as such."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e9 or 0 < size < 5e-4:
        return f"{value:.1e}"
    if whole or size >= 1000:
        return f"{value:.0f}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"


def _stages(stages: list[Stage]) -> str:
    if not stages:
        return ""
    cards = "\n".join(_card(stage) for stage in stages)
    loss = '<span class="line raw"></span>loss <span class="line smooth"></span>its running mean'
    held = '<span class="line held"></span>held-out loss'
    key = "\n".join([loss] * any(stage.curve for stage in stages) + [held] * any(stage.held_out_curve for stage in stages))
    return f"""<section>
<h2>Training</h2>
<p class="key">{key}</p>
<div class="cards">
{cards}
</div>
</section>"""


def _card(stage: Stage) -> str:
    trained = stage.curve or stage.held_out_curve
    chart = curve_svg(stage.curve, stage.held_out_curve, stage.title) if trained else '<p class="soft">Nothing was trained.</p>'
    notes = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(note)}</dd></div>" for name, note in stage.notes.items())
    more = "\n".join(f"<h4>{escape(name)}</h4>\n{curve_svg(curve, [], stage.title, name)}" for name, curve in stage.more.items())
    return f"<article>\n<h3>{escape(stage.title)}</h3>\n{chart}\n{f'<dl>{notes}</dl>' if notes else ''}\n{more}\n</article>"


def curve_svg(curve: Curve, held_out: Curve, title: str, name: str = "loss") -> str:
    """A chart of the loss, or of another number of that name, as an inline SVG, drawn in the colours of the page around it.

    The raw curve is faint under its running mean; held-out losses are dots on a line. The vertical range holds the held-out
    losses, the end of the running mean and all but the outermost 2% of the raw curve: a spike leaves the plot and does not
    flatten it. Non-finite losses are not drawn but counted in the chart. Raises ValueError if both curves are empty.
    """
    if not curve and not held_out:
        raise ValueError("curve and held_out must not both be empty")
    raw, held = _finite(curve), _finite(held_out)
    lost = len(curve) + len(held_out) - len(raw) - len(held)
    smooth = _running_mean(raw)
    steps = [step for step, _ in raw + held] or [0]
    losses = [loss for _, loss in _without_outermost(raw) + smooth[-1:] + held] or [0.0]
    horizontal, vertical = (min(steps), max(steps)), _padded(min(losses), max(losses))
    lines = "".join(
        _line([_place(point, horizontal, vertical) for point in _thinned(points)], kind)
        for points, kind in ((raw, "raw"), (smooth, "smooth"), (held, "held"))
        if points
    )
    width = PLOT_WIDTH + 2 * DOT  # room for the dots at both ends
    warning = f'<text class="alarm" x="{CHART_WIDTH - RIGHT}" y="{TOP + 10}" text-anchor="end">{lost} non-finite</text>' if lost else ""
    return f"""<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{escape(_summary(title, name, smooth, held, lost))}">
{_axes(horizontal, vertical, "step", name)}
<svg x="{LEFT - DOT}" y="{TOP}" width="{width}" height="{PLOT_HEIGHT}" viewBox="{-DOT} 0 {width} {PLOT_HEIGHT}">
{lines}
</svg>
{warning}
</svg>"""


def plot_svg(panels: Sequence[tuple[str, str, Mapping[str, Points]]]) -> str:
    """Charts of measured points as one SVG file that needs no page around it, a panel below the other.

    Args: panels, each the names of its axes, across and up, and the points of each thing by its name. A thing has one colour in all
    panels; its points are joined by a line and have their standard errors. Points that are not finite are left out.
    Raises: ValueError for panels without any point.
    """
    names = list(dict.fromkeys(name for _, _, lines in panels for name in lines))
    colours = {name: f"hsl({360 * number // len(names)} 60% 45%)" for number, name in enumerate(names)}
    drawn = [_panel(across, up, lines, colours) for across, up, lines in panels]
    height = max(CHART_HEIGHT, KEY_LINE * (max(len(lines) for _, _, lines in panels) + 2))
    placed = "\n".join(f'<g transform="translate(0 {height * number})">\n{panel}\n</g>' for number, panel in enumerate(drawn))
    size = f'viewBox="0 0 {CHART_WIDTH + KEY_WIDTH} {height * len(drawn)}"'
    style = STYLE[STYLE.index(":root") : STYLE.index("@media")] + "svg { background: var(--paper); font-family: sans-serif }\n"
    style += "\n".join(line for line in STYLE.splitlines() if line.startswith("svg "))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{style}</style>\n{placed}\n</svg>\n'


def _panel(across: str, up: str, lines: Mapping[str, Points], colours: Mapping[str, str]) -> str:
    """One chart of `plot_svg`, with the names of its lines at its right."""
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in lines.items()}
    known = [point for points in finite.values() for point in points]
    if not known:
        raise ValueError(f"panels must have points, and {up!r} over {across!r} has none")
    horizontal = _padded(min(x for x, _, _ in known), max(x for x, _, _ in known))
    vertical = _padded(min(y - error for _, y, error in known), max(y + error for _, y, error in known))
    parts = [_axes(horizontal, vertical, across, up)]
    for number, (name, points) in enumerate(finite.items()):
        ink = f'style="fill:{colours[name]};stroke:{colours[name]}"'
        places = [(_place((x, y - e), horizontal, vertical), _place((x, y + e), horizontal, vertical)) for x, y, e in points]
        at = [(LEFT + low[0], TOP + (low[1] + high[1]) / 2) for low, high in places]
        parts.append(f'<polyline style="stroke:{colours[name]}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>')
        parts += [f'<circle {ink} cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"/>' for x, y in at]
        parts += [f'<path {ink} d="M{LEFT + low[0]:.1f},{TOP + low[1]:.1f}V{TOP + high[1]:.1f}"/>' for low, high in places]
        y = TOP + KEY_LINE * (number + 1)
        parts.append(f'<circle {ink} cx="{CHART_WIDTH}" cy="{y - 4}" r="{DOT}"/><text x="{CHART_WIDTH + 8}" y="{y}">{escape(name)}</text>')
    return "\n".join(parts)


def _line(places: list[tuple[float, float]], kind: str) -> str:
    """A line through places in the plot; the held-out line and a line of one place have dots."""
    line = f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
    dotted = places if kind == "held" or len(places) == 1 else []
    return line + "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"/>' for x, y in dotted)


def _finite(curve: Curve) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in curve if math.isfinite(loss)]


def _without_outermost(curve: Curve) -> list[tuple[int, float]]:
    """The points of a curve without the 2% of highest and the 2% of lowest loss, by rising loss."""
    cut = len(curve) // 50
    return sorted(curve, key=lambda point: point[1])[cut : len(curve) - cut]


def _running_mean(curve: Curve) -> list[tuple[int, float]]:
    """Each loss averaged with its neighbours on both sides, as far as there are any: no lag, and calm to the last point."""
    half = len(curve) // (2 * SMOOTHING)
    sums = [0.0, *accumulate(loss for _, loss in curve)]
    windows = [(max(0, i - half), min(len(curve), i + half + 1)) for i in range(len(curve))]
    return [(step, (sums[end] - sums[start]) / (end - start)) for (step, _), (start, end) in zip(curve, windows, strict=True)]


def _thinned(points: Curve) -> Curve:
    """At most `MOST_POINTS` of the points, evenly spread, the last among them."""
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-every][::-1]


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range a little wider, and never empty."""
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _place(point: tuple[float, float], horizontal: tuple[float, float], vertical: tuple[float, float]) -> tuple[float, float]:
    """Where a point is in the plot, from its upper left corner; a range of a single step is drawn in the middle."""
    step, loss = point
    width = horizontal[1] - horizontal[0]
    x = (step - horizontal[0]) / width if width else 0.5
    return x * PLOT_WIDTH, (vertical[1] - loss) / (vertical[1] - vertical[0]) * PLOT_HEIGHT


def _axes(horizontal: tuple[float, float], vertical: tuple[float, float], across: str, up: str) -> str:
    """Rules, ticks and the names of both axes; steps are whole numbers."""
    parts = []
    spacing = tick_spacing(vertical, 5)
    for tick in ticks(vertical, spacing):
        y = TOP + _place((0, tick), horizontal, vertical)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{CHART_WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick_label(tick, spacing)}</text>')
    bottom = TOP + PLOT_HEIGHT
    spacing = max(1.0 if across == "step" else 0.0, tick_spacing(horizontal, 5))
    for tick in ticks(horizontal, spacing):
        x = LEFT + _place((tick, 0), horizontal, vertical)[0]
        label = f"{tick / 1000:g}k" if tick and horizontal[1] >= 10_000 else tick_label(tick, spacing)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{TOP}V{bottom}H{CHART_WIDTH - RIGHT}"/>')
    parts.append(f'<text class="soft" x="{LEFT + PLOT_WIDTH / 2}" y="{CHART_HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>')
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(f'<text class="soft" x="11" y="{middle}" text-anchor="middle" transform="rotate(-90 11 {middle})">{escape(up)}</text>')
    return "\n".join(parts)


def tick_spacing(ends: tuple[float, float], most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that puts at most `most` intervals between the ends."""
    least = (ends[1] - ends[0]) / most or 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def ticks(ends: tuple[float, float], spacing: float) -> list[float]:
    """The multiples of the spacing between the ends, both included."""
    return [i * spacing for i in range(math.ceil(ends[0] / spacing - 1e-9), math.floor(ends[1] / spacing + 1e-9) + 1)]


def tick_label(tick: float, spacing: float) -> str:
    """A tick with as many decimals as the spacing needs."""
    decimals = max(0, -math.floor(math.log10(spacing) + 1e-9))
    return f"{tick:.{decimals}f}" if decimals <= 4 and abs(tick) < 1e6 else f"{tick:.2e}"


def _summary(title: str, measure: str, smooth: Curve, held: Curve, lost: int) -> str:
    """The chart in words, for those who do not see it."""
    parts = [
        f"{name} from {number(curve[0][1])} at step {curve[0][0]} to {number(curve[-1][1])} at step {curve[-1][0]}"
        for name, curve in ((measure, smooth), (f"held-out {measure}", held))
        if curve
    ]
    if lost:
        parts.append(f"{lost} non-finite losses")
    return f"{title}: {'; '.join(parts)}"


def _pictures(stages: list[Stage], prompts: list[str]) -> str:
    stages = [stage for stage in stages if stage.images]
    if not stages or not prompts:
        return ""
    least, most = PICTURE_WIDTHS
    room = min(most, max(least, PAGE_WIDTH // len(stages) - PICTURE_GAP))
    rows = []
    for index, prompt in enumerate(prompts):
        heading = escape(prompt) if prompt else '<span class="soft">no prompt</span>'
        figures = "\n".join(_figure(stage, index, prompt, room) for stage in stages)
        rows.append(f'<h3 class="prompt">{heading}</h3>\n<div class="row">\n{figures}\n</div>')
    title = "Pictures" if len(stages) == 1 else "The same prompts and seeds at every stage"
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(rows) + "\n</section>"


def _figure(stage: Stage, index: int, prompt: str, room: int) -> str:
    """One picture, fitted to `room` CSS pixels of width: enlarged by a whole factor, so that its pixels are seen, or reduced."""
    png = stage.images[index]
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            width, height = picture.size
    except UnidentifiedImageError:
        raise ValueError(f"image {index} of stage {stage.name!r} is not a PNG file") from None
    factor = room // width or room / width
    shown_width, shown_height = round(width * factor), max(1, round(height * factor))
    pixels = ' class="pixels"' if factor >= 1 else ""  # a reduced picture is better off with the browser's own filter
    alt = escape(f"{stage.title}: {prompt or 'no prompt'}")
    data = base64.b64encode(png).decode("ascii")
    return f"""<figure style="width:{shown_width}px">
<img{pixels} width="{shown_width}" height="{shown_height}" alt="{alt}" src="data:image/png;base64,{data}">
<figcaption>{escape(stage.title)}</figcaption>
</figure>"""


STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f1d1a; --soft: #6f6a62; --paper: #faf8f4; --card: #fffefc; --rule: #e3ded5;
  --train: #2a62a0; --held: #bf4f12; --alarm: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e9e5de; --soft: #a29b90; --paper: #171614; --card: #201e1b; --rule: #38352f;
    --train: #7fb2e8; --held: #f0985c; --alarm: #ff8a80;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1, h2 { font-family: "Iowan Old Style", Palatino, Georgia, serif; font-weight: 600; line-height: 1.2; overflow-wrap: anywhere }
h1 { font-size: 2.2rem; margin: 0 0 1.25rem }
h2 { font-size: 1.4rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere }
h4 { font-size: .87rem; font-weight: 500; margin: .75rem 0 .25rem; overflow-wrap: anywhere }
code, .facts td { font: .86em/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
table { border-collapse: collapse }
th { font-weight: 500; text-align: left }
th code, .soft { color: var(--soft) }
.facts th { color: var(--soft); padding: .15rem 1.5rem .15rem 0; vertical-align: top; white-space: nowrap }
.facts td { padding: .15rem 0; overflow-wrap: anywhere }
.wide { overflow-x: auto }
.scores { width: 100%; font-variant-numeric: tabular-nums }
.scores th, .scores td { padding: .45rem .5rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap }
.scores th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper) }
.scores tbody th { white-space: normal; min-width: 8rem }
.scores th code { display: block; line-height: 1.3 }
.scores thead th { color: var(--soft); font-size: .87em; vertical-align: bottom }
.scores thead th:not(.word) { white-space: normal }
.alarm { color: var(--alarm); font-weight: 600 }
.key { color: var(--soft); font-size: .87em; margin: 0 0 .75rem }
.line { display: inline-block; width: 1.5em; height: 0; margin: 0 .4em 0 1.2em; border-top: 2px solid var(--train); vertical-align: .3em }
.line.raw { opacity: .35 }
.line:first-child { margin-left: 0 }
.line.held { border-color: var(--held) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem; min-width: 0 }
article svg { display: block; width: 100%; height: auto }
svg text { fill: var(--ink); font-size: 10.5px; font-variant-numeric: tabular-nums }
svg text.soft { fill: var(--soft) }
svg text.alarm { fill: var(--alarm) }
svg polyline { fill: none; stroke: var(--train); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
svg polyline.raw { stroke-width: 1; opacity: .35 }
svg polyline.held { stroke: var(--held); stroke-width: 1.3 }
svg circle { fill: var(--train) }
svg circle.held { fill: var(--held) }
svg .rule { stroke: var(--rule) }
svg .axis { fill: none; stroke: var(--soft) }
dl { margin: .75rem 0 0; font-size: .87em }
dl div { display: flex; gap: .75rem; justify-content: space-between; border-top: 1px solid var(--rule); padding: .25rem 0 }
dt { color: var(--soft) }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0 }
.prompt { margin: 1.5rem 0 .5rem; font-weight: 500 }
.row { display: flex; flex-wrap: wrap; gap: .75rem }
figure { margin: 0; max-width: 100% }
img { display: block; max-width: 100%; height: auto; border-radius: 3px }
img.pixels { image-rendering: pixelated }
figcaption { color: var(--soft); font-size: .8em; line-height: 1.3; margin-top: .3rem; overflow-wrap: anywhere }
@media print { article, .row { break-inside: avoid } }
"""
