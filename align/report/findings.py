"""Faults found in a run's metrics, and the statistics that separate them from noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.report.read import Point, Run
from align.runs.records import is_number

FIRST_UPDATES = 4  # too few to tell a trend
MIN_UPDATES = 8  # before the absence of a change counts as a fault


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: a short name, a title, the numbers that show it, and what to do."""

    severity: Literal["severe", "warning"]
    name: str
    title: str
    evidence: str
    remedy: str


def severity_order(finding: Finding) -> int:
    """A sort key that puts severe faults first."""
    return 0 if finding.severity == "severe" else 1


def describe_updates(run: Run) -> str:
    """The range and number of a PPO run's logged updates, and the responses in each."""
    points = run.series("objective/score")
    batch = run.recipe.get("rollout_batch_size")
    of = f" of {batch} responses" if is_number(batch) else ""
    return f"updates {points[0][0]:.0f} to {points[-1][0]:.0f}, {len(points)} logged{of}" if points else "no updates"


def metric_values(run: Run, name: str) -> list[float]:
    """A metric's values in the order of steps."""
    return [value for _, value in run.series(name)]


def end_values(points: Sequence[Point], which: int, parts: int = 4) -> list[float]:
    """The values of the first (`which` 0) or the last (-1) of `parts` equal parts of a series; at least one value."""
    size = max(len(points) // parts, 1)
    chosen = points[:size] if which == 0 else points[-size:]
    return [value for _, value in chosen]


def quarter_means(run: Run, name: str) -> tuple[float, float] | None:
    """Means of a metric over the first and the last quarter of its points; None before update `FIRST_UPDATES`."""
    points = run.series(name)
    if not reaches(points, FIRST_UPDATES):
        return None
    return statistics.fmean(end_values(points, 0)), statistics.fmean(end_values(points, -1))


def late_median(run: Run, name: str) -> float | None:
    """The median of a metric over the second half of its points; None before update `FIRST_UPDATES`."""
    points = run.series(name)
    return (
        statistics.median(value for _, value in points[len(points) // 2 :]) if reaches(points, FIRST_UPDATES) else None
    )


def reaches(points: Sequence[Point], step: int) -> bool:
    """Whether a metric was logged at `step` or later, and before: with `logging_steps` points are fewer than updates."""
    return len(points) > 1 and points[-1][0] >= step


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 if one of them is constant."""
    ranks = [_ranks(xs), _ranks(ys)]
    means = [statistics.fmean(each) for each in ranks]
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(*ranks, strict=True))
    spreads = [sum((a - mean) ** 2 for a in each) for each, mean in zip(ranks, means, strict=True)]
    return products / math.sqrt(spreads[0] * spreads[1]) if all(spreads) else 0.0


def _ranks(numbers: Sequence[float]) -> list[float]:
    ordered = sorted(range(len(numbers)), key=lambda index: numbers[index])
    found, start = [0.0] * len(numbers), 0
    for place in range(1, len(ordered) + 1):
        if place == len(ordered) or numbers[ordered[place]] != numbers[ordered[start]]:
            for index in ordered[start:place]:
                found[index] = (start + place - 1) / 2
            start = place
    return found
