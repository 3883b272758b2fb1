"""How well scores predict preferences: accuracy, NLL, Brier, calibration and temperature, with intervals by prompt.

p = sigmoid(margin), where the margin is the score of the chosen response minus that of the rejected one, is the
Bradley-Terry probability of the label. A tie in the data counts as half a win and half a loss. Pairs of one prompt are not
independent, so the bootstrap resamples prompts, not pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from align.evaluate.bootstrap import Floats, Measure, bootstrap_intervals, compare

BINS = 10  # of equal width, for confidence in [.5, 1]
WEIGHTED_RESAMPLES = 200  # at most, for scores that are not functions of sums, since each resample computes them anew
LOG_TEMPERATURES = (math.log(1e-3), math.log(1e3))


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Margins that a reward gives to n pairs.

    Attributes:
        margins: [n], score of the chosen minus score of the rejected response.
        prompts: [n], index of each pair's prompt.
        ties: [n], whether the pair is labelled a tie.
    """

    margins: Floats
    prompts: np.ndarray[Any, np.dtype[np.int64]]
    ties: np.ndarray[Any, np.dtype[np.bool_]]

    def select(self, index: np.ndarray[Any, Any]) -> Outcomes:
        """The pairs at an index or boolean mask."""
        return Outcomes(self.margins[index], self.prompts[index], self.ties[index])

    @property
    def decided(self) -> Outcomes:
        """The pairs that are not labelled ties."""
        return self.select(~self.ties)

    @property
    def label(self) -> Floats:
        """[n]: 1, or .5 for a tie."""
        return np.where(self.ties, 0.5, 1.0)

    @property
    def right(self) -> Floats:
        """[n]: 1 where the chosen response scores higher, 0 where lower, .5 for equal scores and labelled ties."""
        return np.where(self.ties, 0.5, np.where(self.margins > 0, 1.0, np.where(self.margins == 0, 0.5, 0.0)))


def number_prompts(prompts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[n], an index for each prompt; equal texts have one index."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.int64)


def nll(margins: Floats, labels: Floats | float = 1.0) -> Floats:
    """Negative log-likelihood [n] in nats, -y ln p - (1-y) ln(1-p), with y = .5 for ties."""
    loss: Floats = -(labels * log_expit(margins) + (1 - labels) * log_expit(-margins))
    return loss


def brier(margins: Floats, labels: Floats | float = 1.0) -> Floats:
    """Brier score [n], y (1-p)^2 + (1-y) p^2, with y = .5 for ties."""
    p = expit(margins)
    squares: Floats = labels * (1 - p) ** 2 + (1 - labels) * p**2
    return squares


def calibration_statistics(margins: Floats, right: Floats, bins: int = BINS) -> Floats:
    """[n, 3 bins]: each pair's contribution to count, correct pairs and confidence max(p, 1-p) of its bin."""
    confidence = expit(np.abs(margins))
    place = np.minimum((2 * bins * (confidence - 0.5)).astype(np.int64), bins - 1)
    one_hot = np.eye(bins)[place]
    return np.hstack([one_hot, one_hot * right[:, None], one_hot * confidence[:, None]])


def ece(sums: Floats) -> float:
    """Expected calibration error from summed `calibration_statistics` [3 bins]."""
    count, hits, confidence = np.split(sums, 3)
    return float(np.abs(hits - confidence).sum() / count.sum())


def reliability(outcomes: Outcomes, bins: int = BINS) -> list[dict[str, float]]:
    """n, mean confidence and accuracy of each bin that has pairs."""
    count, hits, confidence = np.split(calibration_statistics(outcomes.margins, outcomes.right, bins).sum(axis=0), 3)
    return [
        {"n": int(n), "confidence": float(c / n), "accuracy": float(h / n)}
        for n, h, c in zip(count, hits, confidence, strict=True)
        if n
    ]


def temperature(margins: Floats, labels: Floats | float = 1.0, weights: Floats | None = None) -> float:
    """The temperature T in [.001, 1000] at which margins / T have the lowest mean NLL."""

    def loss(log_t: float) -> float:
        return float(np.average(nll(margins * math.exp(-log_t), labels), weights=weights))

    return math.exp(minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-4}).x)


def ece_after_temperature(outcomes: Outcomes, seed: int) -> float:
    """ECE after temperature scaling; the temperature of each half of the prompts is fitted on the other half."""
    half = np.random.default_rng([seed, 2]).permutation(int(outcomes.prompts.max()) + 1)[outcomes.prompts] % 2 == 0
    margins = outcomes.margins.copy()
    for part in (half, ~half):
        if part.any() and not part.all():
            margins[part] /= temperature(outcomes.margins[~part], outcomes.label[~part])
    return ece(calibration_statistics(margins, outcomes.right).sum(axis=0))


def ece_if_calibrated(margins: Floats, seed: int) -> float:
    """95% quantile of the ECE when labels are drawn from the model's own p: a lower ECE is consistent with calibration."""
    random = np.random.default_rng([seed, 3])
    hits = random.random((WEIGHTED_RESAMPLES, len(margins))) < expit(np.abs(margins))
    draws = [ece(calibration_statistics(margins, each.astype(np.float64)).sum(axis=0)) for each in hits]
    return float(np.quantile(draws, 0.95))


def by_prompt(statistics: Floats, prompts: np.ndarray[Any, Any]) -> Floats:
    """Statistics of pairs [n, d] summed by prompt, [prompts, d]; the bootstrap resamples these rows."""
    _, place = np.unique(prompts, return_inverse=True)
    return np.column_stack([np.bincount(place, weights=column) for column in statistics.T])


def mean_with_interval(values: Floats, prompts: np.ndarray[Any, Any], iterations: int, seed: int) -> dict[str, Any]:
    """Mean of `values` [n] with its 95% interval over prompts: `value`, `low`, `high` (None without values), `n`, `prompts`."""
    return score_with_interval(np.column_stack([values, np.ones(len(values))]), mean_of_sums, prompts, iterations, seed)


def mean_of_sums(sums: Floats) -> float:
    """The mean from [sum, count]; NaN if count is 0."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def score_with_interval(
    statistics: Floats,
    score: Callable[[Floats], float],
    prompts: np.ndarray[Any, Any],
    iterations: int,
    seed: int,
) -> dict[str, Any]:
    """A function of the column sums of `statistics` [n, d], as `mean_with_interval` returns a mean."""
    counts = {"n": len(statistics), "prompts": len(np.unique(prompts))}
    if not len(statistics):
        return {"value": None, "low": None, "high": None, **counts}
    measure = Measure(by_prompt(statistics, prompts), lambda sums: {"value": score(sums)})
    low, high = (None, None)
    if counts["prompts"] > 1:  # resampling a single prompt gives no interval
        low, high = bootstrap_intervals(measure, iterations, seed)["value"]
    return _finite({"value": measure.scores()["value"], "low": low, "high": high, **counts})


def weighted_score_with_interval(
    score: Callable[[Floats], float], prompts: np.ndarray[Any, Any], iterations: int, seed: int
) -> dict[str, Any]:
    """As `score_with_interval`, for a score that each resample computes anew from how often each row is drawn, [n]."""
    _, place = np.unique(prompts, return_inverse=True)
    number = int(place.max()) + 1
    random = np.random.default_rng([seed, 4])
    draws = [
        score(np.bincount(random.integers(0, number, number), minlength=number)[place].astype(np.float64))
        for _ in range(min(WEIGHTED_RESAMPLES, iterations) if number > 1 else 0)
    ]
    low, high = (None, None)
    if draws and not np.isnan(draws).all():
        low, high = (float(each) for each in np.nanpercentile(draws, [2.5, 97.5]))
    counts = {"n": len(prompts), "prompts": number}
    return _finite({"value": score(np.ones(len(prompts))), "low": low, "high": high, **counts})


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON does not have, by None."""
    return {name: None if value is not None and math.isnan(value) else value for name, value in found.items()}


def paired_difference(
    right: Floats, other: Floats, prompts: np.ndarray[Any, Any], iterations: int, seed: int
) -> dict[str, Any]:
    """Accuracy of one predictor minus another's on the same pairs, with 95% interval and p-value over prompts."""
    one, two = (
        Measure(by_prompt(np.column_stack([hits, np.ones(len(hits))]), prompts), lambda sums: {"d": mean_of_sums(sums)})
        for hits in (right, other)
    )
    found = compare(one, two, iterations, seed)["d"]
    return {
        "value": found.difference,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "n": len(right),
        "prompts": len(np.unique(prompts)),
    }


def pair_metrics(outcomes: Outcomes, iterations: int, seed: int) -> dict[str, Any]:
    """Accuracy on the pairs that are not ties; NLL, Brier score, ECE and temperature on all pairs."""
    decided = outcomes.decided
    label, prompts, margins = outcomes.label, outcomes.prompts, outcomes.margins
    found: dict[str, Any] = {
        "accuracy": mean_with_interval(decided.right, decided.prompts, iterations, seed),
        "nll": mean_with_interval(nll(margins, label), prompts, iterations, seed),
        "brier": mean_with_interval(brier(margins, label), prompts, iterations, seed),
        "ece": score_with_interval(calibration_statistics(margins, outcomes.right), ece, prompts, iterations, seed),
        "ties_in_data": int(outcomes.ties.sum()),
        "ties_in_scores": int((margins == 0).sum()),
    }
    found["ece"]["if_calibrated"] = ece_if_calibrated(margins, seed)
    found["temperature"] = weighted_score_with_interval(
        lambda weights: temperature(margins, label, weights), prompts, iterations, seed
    )
    found["ece_after_temperature"] = ece_after_temperature(outcomes, seed)
    found["reliability"] = reliability(outcomes)
    most = len(np.histogram_bin_edges(margins, "sturges")) - 1
    counts, edges = np.histogram(margins, bins=2 * most)
    found["margins"] = {"counts": counts.tolist(), "edges": edges.tolist()}
    return found
