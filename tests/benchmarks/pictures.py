"""Pictures from the JSON of a run: SVG of a few lines, for light and dark pages, and bars of text for the README."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import number

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 84, 300, 68, 48
# Told apart by people who do not see all colours, on white and on black: ours are the strong ones.
COLORS = {
    "a": "#8a8f98", "a-": "#8a8f98", "b": "#d55e00", "c": "#cc79a7", "c-": "#b07aa1", "d": "#b8860b", "e": "#56a0d3",
    "f": "#009e73", "g": "#3b78e7",
}  # fmt: skip
DASHES = {"a": "5 4", "c-": "2 3", "g": "7 3"}
_STYLE = """\
  <style>
    text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #24292f }
    .title { font-size: 16px; font-weight: 600 } .soft { fill: #656d76; font-size: 12px }
    .page { fill: #ffffff } .grid { stroke: #d8dee4 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .soft { fill: #9198a1 } .page { fill: #0d1117 } .grid { stroke: #30363d }
    }
  </style>"""


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, the letter of its alternative, its points."""

    name: str
    letter: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Lines over a number of clusters; `unit` is that of the other axis."""

    title: str
    subtitle: str
    unit: str
    lines: Sequence[Line]

    @property
    def top(self) -> float:
        return _round_up(max((max(line.ys) for line in self.lines), default=1.0))

    @property
    def counts(self) -> list[float]:
        return sorted({x for line in self.lines for x in line.xs})

    def x(self, value: float) -> float:
        # Counts that double lie at equal distances.
        place = self.counts.index(value) / max(1, len(self.counts) - 1)
        return LEFT + 12 + place * (WIDTH - LEFT - RIGHT - 24)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM)


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures that the measures in `data` allow; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in _charts(data):
        path = folder / f"{name}.svg"
        path.write_text(svg(chart), encoding="utf-8")
        written.append(path)
    return written


def draw_file(file: Path, folder: Path) -> list[Path]:
    """The same from a file that a run wrote."""
    return draw(json.loads(file.read_text("utf-8")), folder)


def svg(chart: Chart) -> str:
    """The picture as text."""
    parts = [*_frame(chart), *_axes(chart)]
    for line in chart.lines:
        parts += _curve(chart, line)
    parts += _labels(chart)
    return "\n".join([*parts, "</svg>", ""])


def bars(data: dict[str, Any]) -> list[str]:
    """A block of text for each picture, with a bar per alternative: its value at the most clusters that all of them had.

    An index page shows text where it cannot show pictures of a repository.
    """
    return [_bars(chart) for _, chart in _charts(data)]


def _bars(chart: Chart) -> str:
    count = max(set.intersection(*(set(line.xs) for line in chart.lines)))
    values = {line.name.partition(") ")[2]: line.ys[list(line.xs).index(count)] for line in chart.lines}
    scale = 40 / max(values.values())
    rows = [
        f"{name:<26}{value:>6,.0f}  {'█' * round(value * scale) or '▏'}"
        for name, value in sorted(values.items(), key=lambda item: item[1])
    ]
    return "\n".join([f"{chart.title}, {count:g} at once, {chart.unit}", chart.subtitle, "", *rows, ""])


def _charts(data: dict[str, Any]) -> Iterator[tuple[str, Chart]]:
    project = data["options"]["project"]
    chosen = (
        ("time", "seconds", "Time until all clusters have their first result", "s", "warm"),
        (
            "disk-other",
            "MB after, other file system",
            "Disk after the clusters ended",
            "MB",
            "temp directory elsewhere",
        ),
        (
            "disk-same",
            "MB after, same file system",
            "Disk after the clusters ended",
            "MB",
            "temp directory on uv's disk",
        ),
    )
    for name, what, title, unit, state in chosen:
        curves = [curve for measure in data["measures"] for curve in measure["curves"] if curve["what"] == what]
        lines = [Line(one["name"], one["name"].partition(")")[0][1:], one["x"], one["y"]) for one in curves]
        if lines:
            yield name, Chart(title, f"{project} project, {state}; clusters started at the same moment", unit, lines)


def _frame(chart: Chart) -> list[str]:
    title, subtitle = html.escape(chart.title), html.escape(chart.subtitle)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">',
        _STYLE,
        f'  <rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'  <text class="title" x="16" y="26">{title}</text>',
        f'  <text class="soft" x="16" y="45">{subtitle}</text>',
    ]


def _axes(chart: Chart) -> Iterator[str]:
    steps = 4
    for step in range(steps + 1):
        value = chart.top * step / steps
        y = chart.y(value)
        yield f'  <line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        unit = f" {chart.unit}" if step == steps else ""
        yield f'  <text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.6g}{unit}</text>'
    for count in chart.counts:
        yield (
            f'  <text class="soft" x="{chart.x(count):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{count:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'  <text class="soft" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">clusters on one host</text>'


def _curve(chart: Chart, line: Line) -> Iterator[str]:
    points = " ".join(f"{chart.x(x):.1f},{chart.y(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
    color, dash = COLORS.get(line.letter, "#8a8f98"), DASHES.get(line.letter)
    width = 3 if line.letter in {"f", "g"} else 2
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    yield f'  <polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"{dashed}/>'
    for x, y in zip(line.xs, line.ys, strict=True):
        yield f'  <circle cx="{chart.x(x):.1f}" cy="{chart.y(y):.1f}" r="3.5" fill="{color}"/>'


def _labels(chart: Chart) -> Iterator[str]:
    """Each line's name and last value beside its end, pushed apart where ends are close: there is no other legend."""
    ends = sorted(chart.lines, key=lambda line: -line.ys[-1])
    places = _apart([chart.y(line.ys[-1]) for line in ends], 17, TOP - 6, HEIGHT - BOTTOM + 6)
    right = WIDTH - RIGHT
    for line, y in zip(ends, places, strict=True):
        color = COLORS.get(line.letter, "#8a8f98")
        start_x, start_y = chart.x(line.xs[-1]) + 5, chart.y(line.ys[-1])
        leader = f"M{start_x:.1f},{start_y:.1f} L{right + 8},{y:.1f}"
        yield f'  <path d="{leader}" stroke="{color}" stroke-width="1" opacity="0.6" fill="none"/>'
        name = html.escape(line.name.partition(") ")[2] or line.name)
        value = f"{number(line.ys[-1])} {chart.unit}"
        if line.xs[-1] != chart.counts[-1]:
            value += f" (at {line.xs[-1]:g})"
        yield f'  <circle cx="{right + 12}" cy="{y:.1f}" r="4" fill="{color}"/>'
        yield f'  <text x="{right + 21}" y="{y + 4:.1f}">{name}<tspan class="soft" dx="7">{value}</tspan></text>'


def _apart(places: Sequence[float], distance: float, first: float, last: float) -> list[float]:
    """Places from top to bottom, moved as little as need be so that neighbours have their distance."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + distance if found else first))
    for number_ in range(len(found) - 1, -1, -1):
        limit = last if number_ == len(found) - 1 else found[number_ + 1] - distance
        found[number_] = min(found[number_], limit)
    return found


def _round_up(value: float) -> float:
    """A round number that is not smaller, and can be divided by four."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(power * step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if power * step >= value)
