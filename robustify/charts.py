"""Charts as inline SVG: numbers and text in, safe markup out, and nothing to load.

Colours, dashes and hatching are classes of the page's style sheet, so that dark mode and print
change them; every series differs in dash and marker too, and every chart carries its own title.
Bars are sized in percent of their cell, lines in a fixed view box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 26, 14, 50
APART = 58  # between labelled ticks, in view box units: room for "128/255"
STYLES = 6  # how many series the style sheet tells apart
SQUEEZED = 6  # from this many times the marked eps on, the axis grows with the square root


@dataclass(frozen=True)
class Point:
    """Accuracy at one eps."""

    eps: float
    eps_text: str
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One line; `mark` is a letter that names it at its end, or empty."""

    name: str
    points: Sequence[Point]
    mark: str = ""


def bar(
    solid: float,
    *,
    until: float | None = None,
    bounds: Sequence[float] | None = None,
    title: str,
) -> Markup:
    """A share as a bar: solid to `solid`, hatched on to `until`, a whisker over `bounds`."""
    parts = ['<rect class="track" width="100%" height="100%"/>']
    if until is not None and until > solid:
        parts.append(_rect("broken", solid, until) + _rect("hatched", solid, until))
    parts.append(_rect("right", 0, solid))
    if bounds is not None:
        low, high = (_share(bound) for bound in bounds)
        for kind in ("halo", "whisker"):
            parts.append(f'<line class="{kind}" x1="{low}" x2="{high}" y1="50%" y2="50%"/>')
            parts += [f'<line class="{kind}" x1="{x}" x2="{x}" y1="28%" y2="72%"/>'
                      for x in (low, high)]  # fmt: skip
    return Markup(
        f'<svg class="bar" role="img"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def patterns() -> Markup:
    """The hatching that `bar` uses; once per page, before the first bar."""
    return Markup(
        '<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>'
        '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="stripe" width="2" height="5"/></pattern>'
        "</defs></svg>"
    )


def curve(
    series: Sequence[Series],
    *,
    title: str,
    marked: tuple[float, str] | None = None,
    chance: float | None = None,
) -> Markup:
    """Accuracy against eps, a line per series, with one eps and the level of chance marked."""
    every = [point for line in series for point in line.points]
    if not every:
        return Markup("")
    largest = max([point.eps for point in every] + ([marked[0]] if marked else []))
    smallest = marked[0] if marked else 0.0
    axis = Axis(largest, largest > SQUEEZED * smallest > 0)
    parts = [_grid(axis, every, marked)]
    if chance is not None:
        parts.append(_level(chance))
    if marked is not None:
        parts.append(_marker(axis, *marked))
    for number, line in enumerate(series):
        parts.append(_line(axis, line, number % STYLES, len(series) == 1))
    parts.append(_marks(axis, series))
    return Markup(
        f'<svg class="curve" role="img" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


@dataclass(frozen=True)
class Axis:
    """eps to x: linear, or by its square root where one eps lies far beyond the others."""

    largest: float
    squeezed: bool

    def x(self, eps: float) -> float:
        share = min(1.0, max(0.0, eps / self.largest)) if self.largest > 0 else 0.0
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.sqrt(share) if self.squeezed else share)


def _y(accuracy: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, accuracy)))


def _share(fraction: float) -> str:
    return f"{100 * min(1.0, max(0.0, fraction)):.2f}%"


def _rect(kind: str, start: float, end: float) -> str:
    return f'<rect class="{kind}" x="{_share(start)}" width="{_share(end - start)}" height="100%"/>'


def _grid(axis: Axis, points: Sequence[Point], marked: tuple[float, str] | None) -> str:
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = _y(percent / 100)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    for x, text, kind in _ticks(axis, points, marked):
        y = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 5}"/>')
        parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y + 20}" text-anchor="middle">'
                     f"{escape(text)}</text>")  # fmt: skip
    scale = "eps (square-root scale)" if axis.squeezed else "eps"
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{scale}</text>')
    return "".join(parts)


def _ticks(
    axis: Axis, points: Sequence[Point], marked: tuple[float, str] | None
) -> list[tuple[float, str, str]]:
    """Labelled eps values, none closer than `APART`: the marked one first, then both ends."""
    texts = {point.eps: point.eps_text for point in points}
    order = [min(texts), max(texts), *sorted(texts)]
    if marked is not None:
        texts[marked[0]] = marked[1]
        order.insert(0, marked[0])
    kept: list[tuple[float, str, str]] = []
    for eps in order:
        x = axis.x(eps)
        if all(abs(x - other) >= APART for other, _, _ in kept):
            is_marked = marked is not None and eps == marked[0]
            kept.append((x, texts[eps], "marked" if is_marked else "tick"))
    return sorted(kept)


def _level(chance: float) -> str:
    y = _y(chance)
    return (f'<line class="chance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="chance" x="{WIDTH - RIGHT}" y="{y - 6:.1f}" text-anchor="end">'
            "chance</text>")  # fmt: skip


def _marker(axis: Axis, eps: float, text: str) -> str:
    x = axis.x(eps)
    anchor, beside = ("end", -7) if x > 0.7 * WIDTH else ("start", 7)
    return (f'<line class="threat" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="threat" x="{x + beside:.1f}" y="{TOP + 12}" text-anchor="{anchor}">'
            f"threat model {escape(text)}</text>")  # fmt: skip


def key(number: int) -> Markup:
    """A piece of the line that `curve` draws for its series of this number, for a legend."""
    style, shape = f"s{number % STYLES}", _shape(number % STYLES, 20, 7)
    return Markup(
        '<svg class="key" viewBox="0 0 40 14" aria-hidden="true">'
        f'<path class="line {style}" d="M0,7H40"/><path class="point {style}" d="{shape}"/></svg>'
    )


def _line(axis: Axis, series: Series, shape: int, alone: bool) -> str:
    style = f"s{shape}"
    points = sorted(series.points, key=lambda point: point.eps)
    if not points:
        return ""
    at = [(axis.x(point.eps), point) for point in points]
    parts = []
    if alone:
        above = [f"{x:.1f},{_y(point.high):.1f}" for x, point in at]
        below = [f"{x:.1f},{_y(point.low):.1f}" for x, point in reversed(at)]
        parts.append(f'<polygon class="band {style}" points="{" ".join(above + below)}"/>')
    way = " ".join(f"{x:.1f},{_y(point.accuracy):.1f}" for x, point in at)
    parts.append(f'<polyline class="line {style}" points="{way}"/>')
    for x, point in at:
        said = f"{series.name}: {100 * point.accuracy:.1f} % at eps {point.eps_text}"
        parts.append(f'<path class="point {style}" d="{_shape(shape, x, _y(point.accuracy))}">'
                     f"<title>{escape(said)}</title></path>")  # fmt: skip
    return f'<g class="series">{"".join(parts)}</g>'


def _marks(axis: Axis, series: Sequence[Series]) -> str:
    """The letter of each line beside its last point, moved up where letters would overlap."""
    ends = [(max(line.points, key=lambda point: point.eps), line.mark)
            for line in series if line.mark and line.points]  # fmt: skip
    apart = min(17.0, (HEIGHT - TOP - BOTTOM) / max(1, len(ends)))
    parts, lowest = [], float(HEIGHT)
    for last, mark in sorted(ends, key=lambda end: end[0].accuracy):
        lowest = min(_y(last.accuracy) + 5, lowest - apart)
        parts.append(f'<text class="name" x="{axis.x(last.eps) + 9:.1f}" y="{lowest:.1f}">'
                     f"{escape(mark)}</text>")  # fmt: skip
    return "".join(parts)


def _shape(number: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond, triangle down, flat bar around (x, y)."""
    corners: dict[int, list[tuple[float, float]]] = {
        1: [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        2: [(0, -5.5), (5, 4), (-5, 4)],
        3: [(0, -6), (5, 0), (0, 6), (-5, 0)],
        4: [(0, 5.5), (5, -4), (-5, -4)],
        5: [(-6, -2.5), (6, -2.5), (6, 2.5), (-6, 2.5)],
    }
    if number not in corners:
        return f"M{x - 4.5:.1f},{y:.1f}a4.5,4.5 0 1 0 9,0a4.5,4.5 0 1 0 -9,0Z"
    return "M" + "L".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners[number]) + "Z"
