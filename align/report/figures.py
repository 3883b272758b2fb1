"""Figures: a chart with title, explanation and legend, and its numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from align.report.read import Point
from align.report.svg import Bars, Curve, histogram_chart, line_chart, stacked_chart

MAX_ROWS = 40  # of the table of a chart


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table of text and numbers; the first cell of a row is its header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart and its table.

    Attributes:
        legend: name, number of the color, and number of the dash pattern of each curve.
        about: an explanation; code spans in Markdown are shown as code.
        healthy: the healthy range.
    """

    title: str
    svg: Markup
    table: PageTable
    legend: list[tuple[str, int, int]] = field(default_factory=list)
    about: str = ""
    healthy: str = ""


def curves_figure(
    title: str,
    x_label: str,
    y_label: str,
    curves: Sequence[Curve],
    *,
    max_points: int = 240,
    whole_x: bool = True,
    x_range: tuple[float, float] | None = None,
    legend: list[tuple[str, int, int]] | None = None,
    about: str = "",
    healthy: str = "",
) -> Figure | None:
    """A chart of curves; None without points.

    Args:
        max_points: longer curves are thinned, keeping their extremes.
        whole_x: whether x is an integer, such as a step.
        x_range: ends of the x axis; by default those of the points.
        legend: as in `Figure`; by default the curves' names.
    """
    given = [curve for curve in curves if curve.points]
    if not given:
        return None
    thin = [
        Curve(c.name, thinned(c.points, max_points), c.colour, c.dash, c.dots and len(c.points) < 60, c.band[:2000])
        for c in given
    ]
    svg = Markup(line_chart(title, x_label, y_label, thin, whole_x, x_range))
    names = [(curve.name, curve.colour, curve.dash) for curve in given]
    return Figure(title, svg, _curves_table(title, x_label, given), legend or names, about, healthy)


def _curves_table(title: str, x_label: str, curves: Sequence[Curve]) -> PageTable:
    values = [dict(curve.points) for curve in curves]
    bands = [{x: (low, high) for x, low, high in curve.band} for curve in curves]
    xs = sorted({x for each in values for x in each})
    chosen = [xs[index] for index in sorted({round(i * (len(xs) - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)})]
    cut = f" ({len(chosen)} of {len(xs)} rows; metrics.jsonl has all)" if len(chosen) < len(xs) else ""
    rows = []
    for x in chosen:
        cells = []
        for each, band in zip(values, bands, strict=True):
            low_high = f" [{band[x][0]:.4g}, {band[x][1]:.4g}]" if x in band and x in each else ""
            cells.append(f"{each[x]:.5g}{low_high}" if x in each else "")
        rows.append([f"{x:.5g}", *cells])
    return PageTable(f"{title}{cut}", [x_label, *(curve.name for curve in curves)], rows)


def thinned(points: Sequence[Point], max_points: int) -> list[Point]:
    """About `max_points` points at most: the minimum and maximum of each stretch, so that no spike is lost."""
    if len(points) <= max_points:
        return list(points)
    size = math.ceil(len(points) / (max_points / 2))
    found: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        found += sorted({min(stretch, key=lambda each: each[1]), max(stretch, key=lambda each: each[1])})
    return found


def histogram_figure(
    title: str,
    x_label: str,
    series: Sequence[tuple[str, Sequence[float], int]],
    *,
    about: str = "",
    whole: bool = False,
) -> Figure | None:
    """A histogram of several series over common bins, in percent; None without values.

    Args:
        series: name, values and number of the color of each.
        whole: whether the values are integers; then bins have integer widths.
    """
    every = [value for _, values, _ in series for value in values]
    if not every:
        return None
    low, high = min(every), max(every)
    bins = 24 if len(series) < 3 else 14
    size = (high - low) / bins or 1.0
    if whole:
        size = float(max(1, math.ceil((high - low + 1) / bins)))
        high += 1
    count = max(1, math.ceil((high - low) / size - 1e-9))
    edges = [low + index * size for index in range(count + 1)]
    bars = []
    for name, values, colour in series:
        shares = [0.0] * count
        for value in values:
            shares[min(int((value - low) / size), count - 1)] += 100 / len(values)
        bars.append(Bars(f"{name} (n={len(values)})", shares, colour))
    svg = Markup(histogram_chart(title, x_label, "% of responses", edges, bars))
    rows = [
        [f"{edges[i]:.4g} to {edges[i + 1]:.4g}", *(f"{each.values[i]:.1f}" for each in bars)] for i in range(count)
    ]
    table = PageTable(title, [x_label, *(f"{each.name}, %" for each in bars)], rows)
    return Figure(title, svg, table, [(each.name, each.colour, 0) for each in bars], about)


def stacked_figure(
    title: str, x_label: str, parts: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], *, about: str = ""
) -> Figure:
    """A stacked bar chart, one bar for each row.

    Args:
        parts: names of the parts.
        rows: name of each bar and the values of its parts.
    """
    svg = Markup(stacked_chart(title, x_label, rows))
    body = [[name, *(f"{value:.4g}" for value in values), f"{sum(values):.4g}"] for name, values in rows]
    table = PageTable(f"{title}, {x_label}", ["run", *parts, "total"], body)
    return Figure(title, svg, table, [(part, index, 0) for index, part in enumerate(parts)], about)
