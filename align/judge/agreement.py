"""Comparison of two rewards on the same pairs: agreement, accuracies, and pairs that both rank wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.judge.length import compare_accuracy, spearman
from align.judge.pairs import mean_with_interval, weighted_score_with_interval
from align.judge.rows import ScoredPairs


def agreement(first: ScoredPairs, second: ScoredPairs, iterations: int, seed: int) -> dict[str, Any]:
    """Compare two rewards on the pairs that are not ties.

    Returns:
        Measurements as from `align.judge.pairs.mean_with_interval`: `agree`, the share of pairs that both order alike;
        `both_wrong`; `rank_correlation` of the margins (Spearman); `second`, the accuracy of the second reward and the
        first's less it; `right_where_they_differ`, the accuracy of the first where their orders differ.
    """
    one, two = first.outcomes, second.outcomes
    decided = ~one.ties
    mine, theirs = one.select(decided), two.select(decided)
    same = np.sign(mine.margins) == np.sign(theirs.margins)
    wrong = (mine.right == 0) & (theirs.right == 0)

    def part(values: Any) -> dict[str, Any]:
        return mean_with_interval(values.astype(np.float64), mine.prompts, iterations, seed)

    return {
        "agree": part(same),
        "both_wrong": part(wrong),
        "rank_correlation": weighted_score_with_interval(
            lambda weights: spearman(mine.margins, theirs.margins, weights), mine.prompts, iterations, seed
        ),
        "second": compare_accuracy(one, two.margins, iterations, seed),
        "right_where_they_differ": mean_with_interval(mine.right[~same], mine.prompts[~same], iterations, seed),
    }
