"""What was gained for which distance from the SFT model: PPO's evaluations, and best-of-n where it was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from align.report.curves import Labelled, axis_title, interval, sft_value
from align.report.figures import Figure, curves_figure
from align.report.metric_docs import describe
from align.report.read import Point
from align.report.svg import Curve
from align.runs.records import is_number

MEASURES = ("eval/score", "eval/judge", "eval/judge/.+", "eval/true/.+")


def frontiers(runs: Sequence[Labelled], best_of_n: Sequence[tuple[str, dict[str, Any]]]) -> list[Figure]:
    """A chart for each measure over the square root of the KL divergence.

    Args:
        best_of_n: contents of the `results.json` of `align bon`, by name.
    """
    names = sorted({name for each in runs for name in each.run.metrics if _is_measure(name)}, key=_order)
    found = []
    for name in names:
        curves = [curve for each in runs if (curve := _of_run(each, name, len(runs) > 1)) is not None]
        curves += list(_of_best_of_n(name, best_of_n))
        doc = describe("ppo", name)
        figure = curves_figure(
            f"{name.removeprefix('eval/').removeprefix('true/')} against distance",
            "√KL from SFT, √nats per response",
            axis_title(doc.unit) if doc else "reward",
            curves,
            whole_x=False,
            about="A point is an evaluation on held-out prompts; SFT is at 0. Higher at the same distance is better; "
            "a true or a judge's reward that turns down while the score rises is over-optimization.",
        )
        if figure is not None and len(curves[0].points) > 1:
            found.append(figure)
    return found


def _is_measure(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in MEASURES) and not name.endswith(("_low", "_high"))


def _order(name: str) -> int:
    return next(i for i, pattern in enumerate(MEASURES) if re.fullmatch(pattern, name))


def _of_run(each: Labelled, name: str, several: bool) -> Curve | None:
    kl = dict(each.run.series("eval/kl"))
    points = [(math.sqrt(max(kl[step], 0.0)), value) for step, value in each.run.series(name) if step in kl]
    if not points:
        return None
    band = [(math.sqrt(max(kl[x], 0.0)), low, high) for x, low, high in interval(each.run, name) if x in kl]
    if (before := sft_value(each.run, name)) is not None and 0 not in kl:
        points = [(0.0, before), *points]
    # In the order of training, which the line shows; a band can only be drawn along the axis.
    ordered = band == sorted(band)
    return Curve(
        f"PPO, {each.label}" if several else "PPO", points, each.colour, dots=True, band=band if ordered else ()
    )


def _of_best_of_n(name: str, cards: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Curve]:
    for number, (label, card) in enumerate(cards):
        column = "proxy" if name == "eval/score" else "judge"
        points: list[Point] = []
        for entry in card.get("frontier", []):
            kl, value = entry.get("kl"), entry.get(column)
            if is_number(kl) and is_number(value):
                points.append((math.sqrt(max(kl, 0.0)), value))
        if points:
            yield Curve(f"best of n, {label}", sorted(points), 7 - number, dash=1, dots=True)
