"""The two pictures of docs/sampling.md and its table: writes docs/solvers.svg and docs/spectrum.svg, and prints the table.

python docs/draw_sampling.py
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.flow import solvers
from mezzotint.flow.path import interpolate, like
from mezzotint.flow.solvers import SOLVERS, Generators, network_calls
from mezzotint.flow.spectrum import drowning_time, radial_power
from mezzotint.worlds.render import render
from mezzotint.worlds.splits import draw

HERE = Path(__file__).parent
STEPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MOST_CALLS = 128
TABLE = (4, 8, 16, 32, 64, 128)
SHOWN = [name for name in SOLVERS if name != "consistency"]  # which needs a network of another kind
STOCHASTIC = ("ddpm", "dpmpp_2m_sde", "flow_sde")

# The exact problem: independent Gaussians, from fine detail that hardly varies to what varies most.
MEAN = torch.linspace(-1, 1, 64, dtype=torch.float64)
STD = torch.logspace(math.log10(0.05), math.log10(2.0), 64, dtype=torch.float64)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x0 | x_t = x] for x0 ~ N(MEAN, STD^2)."""
    t = like(t, x)
    return (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) * (x - (1 - t) * MEAN) - MEAN


@contextmanager
def impulses() -> Iterator[None]:
    """In place of noise, the k-th draw of a solver is 1 in row k + 2 and 0 elsewhere."""
    drawn, kept = 0, solvers.randn_like

    def impulse(x: Tensor, generator: Generators) -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.zeros_like(x).index_fill_(0, torch.tensor(drawn + 1), 1.0)

    solvers.randn_like = impulse
    try:
        yield
    finally:
        solvers.randn_like = kept


def error(name: str, steps: int) -> float:
    """How far what a solver draws is from the data: the Wasserstein-2 distance of the two Gaussians, root mean square over dimensions.

    Nothing is estimated. The velocity is affine, so that what a solver returns is affine in the noise it starts from and draws: row 0
    shows its mean, the other rows what each number of noise adds.
    """
    x = torch.zeros(steps + 2, 64, dtype=torch.float64)
    x[1] = 1
    with impulses():
        *_, last = SOLVERS[name](velocity, x, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    mean, spread = last.x[0], (last.x[1:] - last.x[0]).square().sum(0).sqrt()
    return float(((mean - MEAN).square() + (spread - STD).square()).mean().sqrt())


@dataclass
class Line:
    """A line of a chart and its name; a dashed one for what the legend says of dashes."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass
class Chart:
    """A chart with logarithmic axes, as an SVG."""

    title: str
    across: str
    up: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[float]
    width: int = 760
    height: int = 460

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is, in pixels."""
        right = (math.log(x) - math.log(self.x[0])) / (math.log(self.x[1]) - math.log(self.x[0]))
        down = (math.log(self.y[1]) - math.log(y)) / (math.log(self.y[1]) - math.log(self.y[0]))
        return 72 + right * (self.width - 72 - 132), 44 + down * (self.height - 44 - 56)

    def axes(self) -> Iterator[str]:
        (left, top), (right, bottom) = self.place(self.x[0], self.y[1]), self.place(self.x[1], self.y[0])
        for power in range(math.ceil(math.log10(self.y[0]) - 1e-9), math.floor(math.log10(self.y[1]) + 1e-9) + 1):
            y = self.place(self.x[0], 10.0**power)[1]
            yield f'<line class="rule" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        for tick in self.x_ticks:
            x = self.place(tick, self.y[0])[0]
            yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{tick:g}</text>'
        middle = (top + bottom) / 2
        yield f'<path class="axis" d="M{left},{top}V{bottom}H{right}"/>'
        yield f'<text class="title" x="{left}" y="24">{escape(self.title)}</text>'
        yield f'<text x="{(left + right) / 2}" y="{bottom + 42}" text-anchor="middle">{escape(self.across)}</text>'
        yield f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">{escape(self.up)}</text>'

    def lines(self, lines: Sequence[Line]) -> Iterator[str]:
        """Lines with their names at their right ends, moved apart where they would overlap."""
        ends = sorted(((self.place(*line.points[-1]), line) for line in lines), key=lambda end: end[0][1])
        lowest = -math.inf
        for (x, y), line in ends:
            points = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in line.points)
            dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
            yield f'<polyline points="{points}" stroke="{line.colour}"{dashes}/>'
            lowest = max(y + 4, lowest + 15)
            yield f'<text class="name" x="{x + 8:.1f}" y="{lowest:.1f}" fill="{line.colour}">{escape(line.name)}</text>'

    def svg(self, lines: Sequence[Line], more: str = "") -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        inside = "\n".join([*self.axes(), *self.lines(lines)])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.title)}">\n'
            f'<style>{STYLE}</style>\n<rect width="100%" height="100%" fill="#fffefc"/>\n{inside}\n{more}\n</svg>\n'
        )


STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #1f1d1a } .title { font-size: 15px; font-weight: 600 } .name { fill: revert-layer }"
    " polyline { fill: none; stroke-width: 2; stroke-linejoin: round } .rule { stroke: #e3ded5 } .axis { fill: none; stroke: #6f6a62 }"
)
COLOURS = ("#2a62a0", "#bf4f12", "#1b7f5c", "#8a3ea8", "#111111", "#b8860b", "#c2185b", "#0097a7")


def solver_chart() -> str:
    """Error against network calls of every solver."""
    lines = []
    for name, colour in zip(SHOWN, COLOURS, strict=True):
        calls = {steps: network_calls(name, steps) for steps in STEPS}
        points = [(float(number), error(name, steps)) for steps, number in calls.items() if number <= MOST_CALLS]
        lines.append(Line(name, points, colour, name in STOCHASTIC))
    ticks = [2.0**k for k in range(1, 8)]
    return Chart("Error against network calls (dashed: stochastic)", "network calls", "error", (2, MOST_CALLS), (1e-4, 1), ticks).svg(lines)


def table() -> str:
    """Error with at most so many network calls, of every solver."""
    rows = [f"| at most so many calls | {' | '.join(map(str, TABLE))} |", "|---" * (len(TABLE) + 1) + "|"]
    for name in SHOWN:
        steps = (calls if network_calls(name, 2) == 2 else calls // 2 for calls in TABLE)
        rows.append(f"| `{name}` | " + " | ".join(f"{error(name, n):.2g}" for n in steps) + " |")
    return "\n".join(rows)


def spectrum_chart(size: int = 64, number: int = 128) -> str:
    """Power of noisy pictures of Worlds at each frequency, for several times."""
    rng = random.Random(0)
    x0 = render([draw(rng, "any") for _ in range(number)], size)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    clean = radial_power(x0).mean((0, 1))
    lines = []
    for t, colour in zip((0.0, 0.1, 0.3, 0.6, 0.9), COLOURS, strict=False):
        power = radial_power(interpolate(x0, eps, torch.full((number,), t))).mean((0, 1))
        lines.append(Line(f"t = {t:g}", [(float(k), float(power[k])) for k in range(1, len(power))], colour))
    times = drowning_time(clean)
    chart = Chart(
        f"Noise drowns the finest first: power of {number} pictures of Worlds",
        "waves per picture",
        "power",
        (1, size / 2),
        (1e-3, 1e2),
        [2.0**k for k in range(int(math.log2(size)))],
    )
    marks = []
    for k in (1, 2, 4, 8, 16, 32):
        x, y = chart.place(k, float(clean[k]))
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#2a62a0"/>')
        marks.append(f'<text x="{x + 4:.1f}" y="{y - 9:.1f}">{float(times[k]):.2f}</text>')
    return chart.svg(lines, "\n".join(marks))


def main() -> None:
    (HERE / "solvers.svg").write_text(solver_chart())
    (HERE / "spectrum.svg").write_text(spectrum_chart())
    print(table())


if __name__ == "__main__":
    main()
