"""How well scores agree with people's ratings of single responses: correlations, and pairs of one prompt in the rated order.

Ratings compare responses to different prompts too, which pairs do not: a reward model trained on pairs has no common zero for all
prompts, so its correlation over all responses can be lower than that of a regression where both order each prompt's responses alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import kendalltau, pearsonr, spearmanr

from align.data.rows import Demonstration
from align.errors import UserError
from align.evaluate.bootstrap import Floats
from align.judge.pairs import mean_with_interval, paired_difference, weighted_score_with_interval

RATING = "rating"
Ints = np.ndarray[Any, np.dtype[np.int64]]
CORRELATIONS: dict[str, Callable[[Floats, Floats], Any]] = {
    "pearson": pearsonr,
    "spearman": spearmanr,
    "kendall": kendalltau,
}


def ratings_of(rows: Sequence[Demonstration]) -> Floats | None:
    """The column `rating` of the rows, [n]; None if no row has one.

    Raises:
        UserError: a row has none and another has one, or one is no number.
    """
    found = [row.extra.get(RATING) for row in rows]
    if all(value is None for value in found):
        return None
    for row, value in zip(rows, found, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            got = "none, and other rows have one" if value is None else repr(value)
            raise UserError(
                f"samples_dataset: {row.where}: expected a number as `{RATING}`, got {got}; a response that several people "
                "rated has their mean."
            )
    return np.array(found, dtype=np.float64)


def correlation(name: str, scores: Floats, ratings: Floats, weights: Floats | None = None) -> float:
    """`pearson`, `spearman` or `kendall` (tau-b) of n responses, as in scipy.stats; NaN where scores or ratings are constant.

    Args:
        weights: [n], whole numbers: how often each response counts.
    """
    drawn = np.arange(len(scores)) if weights is None else np.repeat(np.arange(len(scores)), weights.astype(np.int64))
    x, y = scores[drawn], ratings[drawn]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(CORRELATIONS[name](x, y)[0])


def rated_pairs(scores: Floats, ratings: Floats, prompts: Ints) -> tuple[Floats, Ints]:
    """Every two responses to one prompt whose ratings differ.

    Returns:
        [pairs]: 1 where the better-rated one scores higher, 0 where lower, .5 for equal scores; and [pairs], their prompts.
    """
    right, places = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for prompt in np.unique(prompts):
        mine = np.flatnonzero(prompts == prompt)
        one, two = (mine[side] for side in np.triu_indices(len(mine), 1))
        rated = np.sign(ratings[one] - ratings[two])
        scored = np.sign(scores[one] - scores[two])
        right.append(((1 + rated * scored) / 2)[rated != 0])
        places.append(np.full(len(right[-1]), prompt))
    return np.concatenate(right), np.concatenate(places)


def rating_agreement(
    scores: Floats, second: Floats | None, ratings: Floats, prompts: Ints, iterations: int, seed: int
) -> dict[str, Any]:
    """The agreement of scores [n] with ratings [n], with intervals over prompts.

    Args:
        second: [n], scores of a second reward.
        prompts: [n], index of each response's prompt.

    Returns:
        Measurements as from `align.judge.pairs.mean_with_interval`: the correlations over all responses, and `pair_accuracy`, the mean
        of `rated_pairs`. With a second reward, its own under `second`, and the first's less those, on the same resamples, under
        `difference`.
    """

    def with_interval(score: Callable[[Floats | None], float]) -> dict[str, Any]:
        return weighted_score_with_interval(score, prompts, iterations, seed)

    def measured(values: Floats) -> dict[str, Any]:
        found = {name: with_interval(partial(correlation, name, values, ratings)) for name in CORRELATIONS}
        return {**found, "pair_accuracy": mean_with_interval(*rated_pairs(values, ratings, prompts), iterations, seed)}

    found = measured(scores)
    if second is None:
        return found
    right, places = rated_pairs(scores, ratings, prompts)
    difference = {name: with_interval(partial(_less, name, scores, second, ratings)) for name in CORRELATIONS}
    if len(right):
        other = rated_pairs(second, ratings, prompts)[0]
        difference["pair_accuracy"] = paired_difference(right, other, places, iterations, seed)
    return {**found, "second": measured(second), "difference": difference}


def _less(name: str, scores: Floats, second: Floats, ratings: Floats, weights: Floats | None) -> float:
    return correlation(name, scores, ratings, weights) - correlation(name, second, ratings, weights)
