"""Line charts and histograms as SVG, without a plotting library, for model cards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from align.terminal import printable

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 36  # margins
LINE = 18  # height of a line of the legend
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)  # distinguishable with color blindness (Okabe and Ito)


def draw(steps: Sequence[float], curves: Mapping[str, Sequence[float]], title: str, axis: str = "step") -> str:
    """An SVG line chart of curves over the same steps; non-finite values leave a gap. Ticks are round numbers.

    Args:
        curves: one value per step, by name.
        title: what is on the vertical axis.
        axis: what is on the horizontal one.
    """
    finite = [value for curve in curves.values() for value in curve if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    high += (high == low) * (abs(high) or 1.0)
    whole = axis == "step"
    first, last = steps[0], max(steps[-1], steps[0] + (1 if whole else 1e-3))

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + LINE * (len(curves) + 1) + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    height = HEIGHT + LINE * (len(curves) + 1)
    parts = [_text(LEFT, TOP + 4, title)]
    for value in ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ccc"/>')
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:.6g}", "end"))
    for step in ticks(first, last, whole=whole):
        parts.append(_text(x(step), height - BOTTOM + 20, f"{step:.0f}" if whole else f"{step:.6g}", "middle"))
    parts.append(_text(WIDTH - RIGHT, height - 4, axis, "end"))
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, curve, strict=True) if math.isfinite(v))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{LEFT}" y="{TOP + LINE * (index + 1) - 7}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(LEFT + 16, TOP + LINE * (index + 1) + 2, f"{name}: {curve[0]:.4g} to {curve[-1]:.4g}"))
    return _svg(parts, height)


def draw_bars(edges: Sequence[float], counts: Sequence[int], title: str, axis: str) -> str:
    """An SVG histogram of n counts between n + 1 edges.

    Args:
        title, axis: what is on the vertical and on the horizontal axis.
    """
    low, high, most = edges[0], max(edges[-1], edges[0] + 1e-9), max(*counts, 1)
    top, bottom = TOP + LINE, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [_text(LEFT, TOP + 4, title)]
    for value in ticks(0, most, whole=True):
        parts.append(_text(LEFT - 6, bottom - value / most * (bottom - top) + 4, f"{value:.6g}", "end"))
    for value in ticks(low, high):
        parts.append(_text(x(value), bottom + 20, f"{value:.6g}", "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, axis, "end"))
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        size = count / most * (bottom - top)
        place = f'x="{x(left):.1f}" y="{bottom - size:.1f}" width="{x(right) - x(left):.1f}" height="{size:.1f}"'
        parts.append(f'<rect {place} fill="{COLOURS[0]}" stroke="#fff"/>')
    return _svg(parts, HEIGHT)


def _svg(parts: Sequence[str], height: int) -> str:
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers between two different ones, both included: two to six multiples of 1, 2 or 5 times a power of ten.

    Args:
        whole: integers only, of which there may be only one.
    """
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    size *= next(each for each in (1, 2, 5, 10) if (high - low) / (each * size) <= 5)
    size = max(size, 1.0) if whole else size
    slack = 1e-9 * (high - low)  # an end that is a multiple stays one in floating point
    numbers = range(math.ceil((low - slack) / size), math.floor((high + slack) / size) + 1)
    return [number * size for number in numbers]


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(printable(words))}</text>'
