"""Uncertainty of scores: bootstrap confidence intervals, and paired tests of two models on the same rows.

Everything works on statistics of single rows, [n, d], whose sums over rows determine the score. That covers means,
ratios of sums (perplexity) and corpus scores (BLEU, macro F1) alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Score = Callable[[Floats], dict[str, float]]
CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Measure:
    """Statistics of n rows, [n, d], and the scores by name that their sums [d] determine.

    Attributes:
        has_row_scores: whether the score of a single row means something.
    """

    statistics: Floats
    score: Score
    has_row_scores: bool = True

    def scores(self) -> dict[str, float]:
        """The scores of all rows."""
        return self.score(self.statistics.sum(axis=0))

    def rows(self, index: list[int]) -> Measure:
        """The measure of some of the rows."""
        return Measure(self.statistics[index], self.score, self.has_row_scores)


def bootstrap_intervals(measure: Measure, iterations: int, seed: int) -> dict[str, tuple[float, float]]:
    """The 95% percentile interval of each score: `scipy.stats.bootstrap` with `method="percentile"`.

    Resamples are sums of statistics, so a score of a whole corpus costs no more than one of a mean.
    """
    samples = _score_each(measure.score, _resampled_sums(measure.statistics, iterations, seed))
    return {name: _percentile_interval(values) for name, values in samples.items()}


def mean_interval(
    values: Sequence[float], groups: Sequence[Hashable], iterations: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of n values, and its 95% percentile interval, for which whole groups are drawn.

    Rows of one group, such as those of one prompt, are not independent: drawn one by one, they give too narrow an interval.

    Args:
        groups: of each value. With fewer than two of them the interval is that from minus to plus infinity.
    """
    members = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    statistics = np.zeros((len(members), 2))  # sum and count of each group
    for value, group in zip(values, groups, strict=True):
        statistics[members[group]] += (value, 1.0)
    mean = float(statistics[:, 0].sum() / len(values)) if len(values) else float("nan")
    if len(members) < 2:
        return mean, -float("inf"), float("inf")
    sums = _resampled_sums(statistics, iterations, seed)
    return mean, *_percentile_interval(sums[:, 0] / sums[:, 1])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Score of a model less that of another on the same rows, its 95% interval, and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def compare(measure: Measure, baseline: Measure, iterations: int, seed: int) -> dict[str, Comparison]:
    """Paired comparison of `measure` with `baseline`, which has the same rows in the same order.

    The interval is the percentile interval of the paired bootstrap: both are scored on the same resamples. The
    p-value is that of approximate randomization (Noreen 1989), `scipy.stats.permutation_test` with
    `permutation_type="samples"`: the share of random swaps of the two models' results, row by row, whose difference
    is at least as large, the observed assignment counted as one of them.
    """
    pair = (measure, baseline)
    samples = [_score_each(each.score, _resampled_sums(each.statistics, iterations, seed)) for each in pair]
    swaps = np.random.default_rng([seed, 1]).integers(0, 2, (iterations, len(measure.statistics))).astype(np.float64)
    change = swaps @ (baseline.statistics - measure.statistics)
    swapped = [
        _score_each(measure.score, measure.statistics.sum(axis=0) + change),
        _score_each(measure.score, baseline.statistics.sum(axis=0) - change),
    ]
    scores, baseline_scores = measure.scores(), baseline.scores()
    comparisons = {}
    for name, score in scores.items():
        difference = score - baseline_scores[name]
        null = np.abs(swapped[0][name] - swapped[1][name])
        tolerance = 1e-9 * max(1.0, abs(score))  # the same assignment may add up to another last digit
        p_value = (1 + int((null >= abs(difference) - tolerance).sum())) / (1 + iterations)
        low, high = _percentile_interval(samples[0][name] - samples[1][name])
        comparisons[name] = Comparison(difference, low, high, p_value)
    return comparisons


def _resampled_sums(statistics: Floats, iterations: int, seed: int) -> Floats:
    """Sums of the statistics over each resample of the rows, [iterations, d]. Resamples depend on seed and n alone."""
    count = len(statistics)
    random = np.random.default_rng([seed, 0])
    return np.array(
        [
            np.bincount(random.integers(0, count, count), minlength=count).astype(np.float64) @ statistics
            for _ in range(iterations)
        ]
    )


def _score_each(score: Score, sums: Floats) -> dict[str, Floats]:
    """Scores by name of each row of sums [iterations, d], [iterations] each."""
    scored = [score(each) for each in sums]
    return {name: np.array([scores[name] for scores in scored]) for name in scored[0]}


def _percentile_interval(values: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [50 * (1 - CONFIDENCE_LEVEL), 50 * (1 + CONFIDENCE_LEVEL)])
    return float(low), float(high)
