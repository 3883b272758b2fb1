"""Length bias of a reward: correlations with the length in characters, accuracy by length, length-controlled accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from align.evaluate.bootstrap import Floats
from align.judge.pairs import Outcomes, mean_with_interval, paired_difference, weighted_score_with_interval


def spearman(a: Floats, b: Floats, weights: Floats | None = None) -> float:
    """Spearman's rank correlation, as `scipy.stats.spearmanr`; NaN if `a` or `b` is constant.

    Args:
        a, b: [n].
        weights: [n], how often each pair of values counts; ranks are those of the unweighted sample.
    """
    ranks = np.vstack([rankdata(a), rankdata(b)])
    weights = np.ones(len(a)) if weights is None else weights
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = np.cov(ranks, aweights=weights, ddof=0)
        return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def length_controlled(wins: Floats, differences: Floats, weights: Floats | None = None) -> float:
    """Win rate at equal lengths: AlpacaEval 2's `length_controlled_minimal` (arXiv 2404.04475).

    The prediction at length difference 0 of an unregularized logistic regression of the win on an intercept and
    tanh(length difference / its standard deviation).

    Args:
        wins: [n] from 0 to 1; .5 counts as half a win and half a loss.
        differences: [n], length of the response that may win minus that of the other.
        weights: [n], how often each row counts.
    """
    from sklearn.linear_model import LogisticRegression

    weights = np.ones(len(wins)) if weights is None else weights
    if (spread := float(np.std(differences))) == 0:
        return float(np.average(wins, weights=weights))
    feature = np.tanh(differences / spread)
    each = np.concatenate([weights * wins, weights * (1 - wins)])
    used = each > 0
    won = np.repeat([1, 0], len(wins))[used]
    if len(set(won.tolist())) == 1:
        return float(won[0])
    x = np.concatenate([feature, feature])[used, None]
    model = LogisticRegression(C=np.inf, tol=1e-6).fit(x, won, sample_weight=each[used])
    return float(model.predict_proba([[0.0]])[0, 1])


def length_metrics(
    outcomes: Outcomes, scores: tuple[Floats, Floats], lengths: tuple[Floats, Floats], iterations: int, seed: int
) -> dict[str, Any]:
    """Measure the length bias of a reward.

    Args:
        scores, lengths: of the chosen and of the rejected responses, [n] each; lengths in characters.
    """
    decided = ~outcomes.ties
    prompts, right = outcomes.prompts, outcomes.right
    difference = lengths[0] - lengths[1]
    longer, shorter = decided & (difference > 0), decided & (difference < 0)
    all_scores, all_lengths = np.concatenate(scores), np.concatenate(lengths)
    found = {
        "score_with_length": weighted_score_with_interval(
            lambda weights: spearman(all_scores, all_lengths, weights),
            np.concatenate([prompts, prompts]),
            iterations,
            seed,
        ),
        "within_pairs": weighted_score_with_interval(
            lambda weights: spearman(outcomes.margins, difference, weights), prompts, iterations, seed
        ),
        "accuracy_longer_won": mean_with_interval(right[longer], prompts[longer], iterations, seed),
        "accuracy_shorter_won": mean_with_interval(right[shorter], prompts[shorter], iterations, seed),
    }
    if decided.any():
        wins, differences = right[decided], difference[decided]
        found["length_controlled_accuracy"] = weighted_score_with_interval(
            lambda weights: length_controlled(wins, differences, weights), prompts[decided], iterations, seed
        )
    return found


def longer_wins(lengths: tuple[Floats, Floats]) -> Floats:
    """Margins [n] of the baseline that prefers the longer response."""
    return np.sign(lengths[0] - lengths[1])


def compare_accuracy(
    outcomes: Outcomes, other_margins: Floats, iterations: int, seed: int, keep: Sequence[bool] | None = None
) -> dict[str, Any]:
    """Accuracy of another predictor on the pairs that are not ties, and the reward's accuracy minus it.

    Args:
        other_margins: [n], of the other predictor.
        keep: [n], pairs to use; all by default.
    """
    used = ~outcomes.ties if keep is None else ~outcomes.ties & np.array(keep)
    mine = outcomes.select(used)
    other = Outcomes(other_margins[used], mine.prompts, mine.ties)
    if not len(mine.margins):
        return {"accuracy": None, "difference": None}
    return {
        "accuracy": mean_with_interval(other.right, mine.prompts, iterations, seed),
        "difference": paired_difference(mine.right, other.right, mine.prompts, iterations, seed),
    }
