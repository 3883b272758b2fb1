"""Two rewards on the same pairs: how far they agree, which is better, and what both get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.judge.length import against, spearman
from align.judge.pairs import share, slow_interval
from align.judge.rows import Scored


def agreement(first: Scored, second: Scored, iterations: int, seed: int) -> dict[str, Any]:
    """Of the decided pairs: share ordered alike, both right, both wrong; rank correlation of margins; accuracies."""
    one, two = first.outcomes, second.outcomes
    decided = ~one.ties
    mine, theirs = one.select(decided), two.select(decided)
    same = np.sign(mine.margins) == np.sign(theirs.margins)
    wrong = (mine.right == 0) & (theirs.right == 0)

    def part(values: Any) -> dict[str, Any]:
        return share(values.astype(np.float64), mine.prompts, iterations, seed)

    return {
        "agree": part(same),
        "both_wrong": part(wrong),
        "rank_correlation": slow_interval(
            lambda weights: spearman(mine.margins, theirs.margins, weights), mine.prompts, iterations, seed
        ),
        "second": against(one, two.margins, iterations, seed),
        "right_where_they_differ": share(mine.right[~same], mine.prompts[~same], iterations, seed),
    }
