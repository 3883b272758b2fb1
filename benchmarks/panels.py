"""Line plots in several panels as one SVG, without a library. Vertical axes are logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLUMNS = 3
WIDTH, HEIGHT = 320, 260  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 24, 44  # its margins
LEGEND = 32  # height of the line of names above all panels
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#888888")  # color-blind safe (Okabe and Ito)


@dataclass(frozen=True)
class Panel:
    """Curves over the same x values: positive numbers on a logarithmic axis, or words at equal distances."""

    title: str  # of the horizontal axis, with its unit
    values: Sequence[float | str]
    curves: Mapping[str, Sequence[float]]  # values that are not positive are left out
    labels: Sequence[float | str] = ()  # the values that the axis names; all by default


def draw(panels: Sequence[Panel], unit: str, dashed: str) -> str:
    """An SVG document with all panels; curves of the same name have the same style.

    Args:
        unit: of all vertical axes.
        dashed: name of the curves to draw dashed.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    columns = min(COLUMNS, len(panels))
    width, height = max(2, columns) * WIDTH, LEGEND + math.ceil(len(panels) / columns) * HEIGHT
    parts, x = [], float(LEFT)
    for name in names:
        parts.append(_line([(x, 16), (x + 24, 16)], colours[name], name == dashed))
        parts.append(_text(x + 30, 20, name))
        x += 50 + 6.5 * len(name)
    for index, panel in enumerate(panels):
        x, y = index % columns * WIDTH, LEGEND + index // columns * HEIGHT
        parts.append(f'<g class="panel" transform="translate({x} {y})">')
        parts += [*_panel(panel, unit, colours, dashed), "</g>"]
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(panel: Panel, unit: str, colours: Mapping[str, str], dashed: str) -> list[str]:
    places = [math.log(value) if isinstance(value, int | float) else index for index, value in enumerate(panel.values)]
    steps = ticks([number for curve in panel.curves.values() for number in curve if number > 0])

    def x(place: float) -> float:
        share = (place - places[0]) / (places[-1] - places[0]) if len(places) > 1 else 0.5
        return LEFT + 12 + share * (WIDTH - LEFT - RIGHT - 24)

    def y(number: float) -> float:
        share = math.log(number / steps[0]) / math.log(steps[-1] / steps[0])
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    parts = [_text(4, TOP - 10, unit), _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel.title, "middle")]
    for number in steps:
        parts.append(f'<path d="M{LEFT} {y(number):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y(number) + 4, f"{number:g}", "end"))
    for value, place in zip(panel.values, places, strict=True):
        if not panel.labels or value in panel.labels:
            parts.append(_text(x(place), HEIGHT - BOTTOM + 18, f"{value}", "middle"))
    for name, curve in panel.curves.items():
        points = [(x(place), y(number)) for place, number in zip(places, curve, strict=True) if number > 0]
        parts.append(_line(points, colours[name], name == dashed))
        if name != dashed:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colours[name]}"/>' for a, b in points]
    return parts


def ticks(numbers: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around the range of the numbers; only the powers if these are too many."""
    powers = range(math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers))) + 2)
    for sizes in ((1, 2, 5), (1,)):
        steps = [float(f"{size}e{power}") for power in powers for size in sizes]
        below, above = (
            [each for each in steps if each <= min(numbers)],
            [each for each in steps if each >= max(numbers)],
        )
        found = [each for each in steps if below[-1] <= each <= above[0]]
        if len(found) <= 8:
            break
    return found if len(found) > 1 else [found[0], above[1]]


def _line(points: Sequence[tuple[float, float]], colour: str, dashes: bool) -> str:
    ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f'fill="none" stroke="{colour}" stroke-width="2"' + ' stroke-dasharray="5 4"' * dashes
    return f'<polyline points="{ends}" {style}/>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
