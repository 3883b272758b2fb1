"""Charts as SVG in the page's colors. `data-` attributes hold the values for the page's script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from align.report.read import Point
from align.runs.charts import ticks
from align.terminal import printable

WIDTH, HEIGHT = 380, 232
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 40  # margins
COLOURS = 8  # in style.css: .c0 to .c7


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve.

    Attributes:
        colour: number of its color, from 0.
        dash: 0 for a solid line, 1 to 3 for dash patterns.
        dots: whether to mark its points.
        band: x, low and high of an interval around it.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Bars:
    """One series of a histogram."""

    name: str
    values: Sequence[float]
    colour: int = 0


class _Axes:
    """The plot area: coordinates of values, grid, ticks and axis titles."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], whole_x: bool = False):
        self.x, self.y, self.whole = _widened(*x), _widened(*y), whole_x
        if whole_x and self.x[1] - self.x[0] < 1:
            self.x = (self.x[0], self.x[0] + 1)

    def at_x(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def draw(self, title: str, x_label: str, y_label: str, content: Iterable[str]) -> str:
        parts = [_text_element(4, 14, y_label, "start", "axis")]
        for value in ticks(*self.y):
            at = self.at_y(value)
            parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text_element(LEFT - 7, at + 4, _format_number(value), "end"))
        for value in ticks(*self.x, whole=self.whole):
            parts.append(_text_element(self.at_x(value), HEIGHT - BOTTOM + 17, _format_number(value), "middle"))
        parts.append(_text_element(WIDTH - RIGHT, HEIGHT - 4, x_label, "end", "axis"))
        bounds = " ".join(f"{each:.8g}" for each in (*self.x, *self.y))
        area = f"{LEFT} {WIDTH - RIGHT} {HEIGHT - BOTTOM} {TOP}"
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_attribute(title)}" data-values="{bounds}" '
            f'data-area="{area}">{"".join(parts)}{"".join(content)}</svg>'
        )


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    curves: Sequence[Curve],
    whole_x: bool = True,
    x_range: tuple[float, float] | None = None,
) -> str:
    """A chart of curves; at least one must have a point.

    Args:
        title: the accessible name.
        x_label, y_label: axis titles with units.
        whole_x: whether x is an integer.
        x_range: ends of the x axis; by default those of the points.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points] + [y for c in curves for _, *ends in c.band for y in ends]
    axes = _Axes(x_range or (min(xs), max(xs)), (min(ys), max(ys)), whole_x)
    content = []
    for curve in curves:
        css_class = f"c{curve.colour % COLOURS} dash{min(curve.dash, 3)}"
        drawn = []
        if curve.band:
            ring = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
            drawn.append(f'<polygon class="band" points="{_point_list(axes, ring)}"/>')
        drawn.append(f'<polyline points="{_point_list(axes, curve.points)}"/>')
        if curve.dots or len(curve.points) == 1:
            drawn += [f'<circle cx="{axes.at_x(x):.1f}" cy="{axes.at_y(y):.1f}" r="3.5"/>' for x, y in curve.points]
        content.append(f'<g class="curve {css_class}" data-name="{_attribute(curve.name)}">{"".join(drawn)}</g>')
    return axes.draw(title, x_label, y_label, content)


def histogram_chart(title: str, x_label: str, y_label: str, edges: Sequence[float], bars: Sequence[Bars]) -> str:
    """A histogram; the bars of the series stand side by side in each bin.

    Args:
        edges: [n + 1] of the n bins.
    """
    axes = _Axes((edges[0], edges[-1]), (0.0, max(value for each in bars for value in each.values) or 1.0))
    content = []
    for index, each in enumerate(bars):
        drawn = []
        for low, high, value in zip(edges, edges[1:], each.values, strict=False):
            width = (axes.at_x(high) - axes.at_x(low)) / len(bars)
            at, top = axes.at_x(low) + index * width, axes.at_y(value)
            tip = escape(printable(f"{each.name}, {low:.4g} to {high:.4g}: {value:.4g}"))
            drawn.append(
                f'<rect x="{at:.1f}" y="{top:.1f}" width="{max(width - 0.6, 0.6):.1f}" '
                f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{tip}</title></rect>'
            )
        content.append(f'<g class="bars c{each.colour % COLOURS}">{"".join(drawn)}</g>')
    return axes.draw(title, x_label, y_label, content)


def stacked_chart(title: str, x_label: str, rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """A horizontal stacked bar chart; the parts have the colors 0, 1, 2, ... in every bar."""
    height = TOP + 54 * len(rows) + BOTTOM
    axes = _Axes((0.0, max(sum(parts) for _, parts in rows) or 1.0), (0.0, 1.0))
    drawn = []
    for value in ticks(*axes.x):
        at = axes.at_x(value) - LEFT + 8
        drawn.append(f'<path class="rule" d="M{at:.1f} {TOP - 8}V{height - BOTTOM}"/>')
        drawn.append(_text_element(at, height - BOTTOM + 17, _format_number(value), "middle"))
    drawn.append(_text_element(WIDTH - RIGHT, height - 4, x_label, "end", "axis"))
    for index, (name, parts) in enumerate(rows):
        top, at = TOP + 54 * index, 8.0
        drawn.append(_text_element(8, top + 6, name))
        for colour, value in enumerate(parts):
            width = axes.at_x(value) - LEFT
            drawn.append(
                f'<g class="bars c{colour % COLOURS}"><rect x="{at:.1f}" y="{top + 13}" width="{width:.1f}" height="24"/></g>'
            )
            at += width
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_attribute(title)}">{"".join(drawn)}</svg>'


def _widened(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis, widened if they are equal up to rounding."""
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low, high + (abs(high) or 1.0))


def _format_number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-300 else value:.6g}".replace("-", "−")


def _point_list(axes: _Axes, points: Iterable[Point]) -> str:
    return " ".join(f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in points if math.isfinite(y))


def _text_element(x: float, y: float, words: str, anchor: str = "start", css_class: str = "tick") -> str:
    return f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(printable(words))}</text>'


def _attribute(text: str) -> str:
    return escape(printable(text, one_line=True), quote=True)
