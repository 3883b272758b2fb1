"""What chance could have made of a number: bootstrap intervals, and paired tests of two models on the same rows.

All of it works on per-row statistics [n, d] whose sums over rows give the score, so it is right for means, for ratios
of sums (perplexity) and for scores of a whole corpus (BLEU, macro-F1) alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Score = Callable[[Floats], dict[str, float]]
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Measure:
    """Statistics of n rows, [n, d], and the scores that their sums [d] give.

    Attributes:
        has_row_scores: whether the score of a single row means something.
    """

    statistics: Floats
    score: Score
    has_row_scores: bool = True

    def scores(self) -> dict[str, float]:
        return self.score(self.statistics.sum(axis=0))

    def rows(self, index: list[int]) -> Measure:
        return Measure(self.statistics[index], self.score, self.has_row_scores)


def intervals(measure: Measure, iterations: int, seed: int) -> dict[str, tuple[float, float]]:
    """The 95% percentile interval of each score when rows are drawn anew with replacement, as many as there are."""
    samples = _scores(measure.score, _resample(measure.statistics, iterations, seed))
    return {name: _percentiles(values) for name, values in samples.items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much more one model scores than another on the same rows, its 95% interval, and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def compare(measure: Measure, baseline: Measure, iterations: int, seed: int) -> dict[str, Comparison]:
    """`measure` less `baseline`, whose rows are the same in the same order.

    The interval is the percentile interval of the paired bootstrap: both are scored on the same resamples. The
    p-value is of approximate randomisation (Noreen 1989): how often the difference is as large when each row's two
    results change sides by a toss of a coin, the observed sides counted as one of the tosses.
    """
    both = [_scores(each.score, _resample(each.statistics, iterations, seed)) for each in (measure, baseline)]
    sides = np.random.default_rng([seed, 1]).integers(0, 2, (iterations, len(measure.statistics))).astype(np.float64)
    moved = sides @ (baseline.statistics - measure.statistics)
    tossed = [
        _scores(measure.score, measure.statistics.sum(axis=0) + moved),
        _scores(measure.score, baseline.statistics.sum(axis=0) - moved),
    ]
    own, other = measure.scores(), baseline.scores()
    found = {}
    for name in own:
        difference = own[name] - other[name]
        chance = np.abs(tossed[0][name] - tossed[1][name])
        # The same rows on the same sides may add up to another last digit.
        as_large = chance >= abs(difference) - 1e-9 * max(1.0, abs(own[name]))
        p_value = (1 + int(as_large.sum())) / (1 + iterations)
        found[name] = Comparison(difference, *_percentiles(both[0][name] - both[1][name]), p_value)
    return found


def _resample(statistics: Floats, iterations: int, seed: int) -> Floats:
    """Sums of the statistics over the rows of each resample, [iterations, d]; the same rows for one seed and n."""
    count = len(statistics)
    random = np.random.default_rng([seed, 0])
    return np.array(
        [
            np.bincount(random.integers(0, count, count), minlength=count).astype(np.float64) @ statistics
            for _ in range(iterations)
        ]
    )


def _scores(score: Score, sums: Floats) -> dict[str, Floats]:
    scored = [score(each) for each in sums]
    return {name: np.array([scores[name] for scores in scored]) for name in scored[0]}


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
