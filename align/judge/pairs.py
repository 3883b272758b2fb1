"""How well scores predict preferences: accuracy, NLL, Brier, calibration and temperature, with intervals by prompt.

p = sigmoid(margin), margin = score of the chosen response less that of the rejected one, is the Bradley-Terry probability
that the label is right. A tie in the data is half a pair won and half a pair lost. Pairs of one prompt are not independent,
so prompts are resampled, not pairs.
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

BINS = 10  # of confidence, of equal width on [.5, 1]
SLOW_RESAMPLES = 200  # at most, of what is no sum over pairs and is computed anew for each resample
LOG_TEMPERATURES = (math.log(1e-3), math.log(1e3))


@dataclass(frozen=True, slots=True)
class Outcomes:
    """n pairs with a reward's margins.

    Attributes:
        margins: [n], score of chosen less score of rejected.
        prompts: [n], a number for each prompt, the same for pairs of one prompt.
        ties: [n], whether the data says that neither is better.
    """

    margins: Floats
    prompts: np.ndarray[Any, np.dtype[np.int64]]
    ties: np.ndarray[Any, np.dtype[np.bool_]]

    def select(self, index: np.ndarray[Any, Any]) -> Outcomes:
        """Some of the pairs."""
        return Outcomes(self.margins[index], self.prompts[index], self.ties[index])

    @property
    def decided(self) -> Outcomes:
        """The pairs that are no ties in the data."""
        return self.select(~self.ties)

    @property
    def label(self) -> Floats:
        """[n]: 1, or .5 for a tie."""
        return np.where(self.ties, 0.5, 1.0)

    @property
    def right(self) -> Floats:
        """[n]: 1 where the better response scores higher, 0 where lower, .5 for equal scores and for ties in the data."""
        return np.where(self.ties, 0.5, np.where(self.margins > 0, 1.0, np.where(self.margins == 0, 0.5, 0.0)))


def number_prompts(prompts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[n], a number for each different prompt."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.int64)


def nll(margins: Floats, labels: Floats | float = 1.0) -> Floats:
    """-y ln p - (1-y) ln(1-p) of each pair, in nats; y = .5 is the loss of a tie, least (ln 2) at margin 0."""
    loss: Floats = -(labels * log_expit(margins) + (1 - labels) * log_expit(-margins))
    return loss


def brier(margins: Floats, labels: Floats | float = 1.0) -> Floats:
    """(1-p)^2 of each pair, for y = .5 half of that and half of p^2."""
    p = expit(margins)
    squares: Floats = labels * (1 - p) ** 2 + (1 - labels) * p**2
    return squares


def calibration_statistics(margins: Floats, right: Floats, bins: int = BINS) -> Floats:
    """[n, 3 bins]: of each pair its place in the count, the hits and the confidence c = max(p, 1-p) of its bin."""
    confidence = expit(np.abs(margins))
    place = np.minimum((2 * bins * (confidence - 0.5)).astype(np.int64), bins - 1)
    one_hot = np.eye(bins)[place]
    return np.hstack([one_hot, one_hot * right[:, None], one_hot * confidence[:, None]])


def ece(sums: Floats) -> float:
    """Expected calibration error from summed `calibration_statistics`: |hits - confidence| over all pairs."""
    count, hits, confidence = np.split(sums, 3)
    return float(np.abs(hits - confidence).sum() / count.sum())


def reliability(outcomes: Outcomes, bins: int = BINS) -> list[dict[str, float]]:
    """Each bin that has pairs: n, mean confidence, share of hits."""
    count, hits, confidence = np.split(calibration_statistics(outcomes.margins, outcomes.right, bins).sum(axis=0), 3)
    return [
        {"n": int(n), "confidence": float(c / n), "accuracy": float(h / n)}
        for n, h, c in zip(count, hits, confidence, strict=True)
        if n
    ]


def temperature(margins: Floats, labels: Floats | float = 1.0, weights: Floats | None = None) -> float:
    """The T at which margins / T have the least NLL, from .001 to 1000."""

    def loss(log_t: float) -> float:
        return float(np.average(nll(margins * math.exp(-log_t), labels), weights=weights))

    return math.exp(minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-4}).x)


def calibrated_ece(outcomes: Outcomes, seed: int) -> float:
    """ECE after each half of the prompts is divided by the temperature that fits the other half."""
    half = np.random.default_rng([seed, 2]).permutation(int(outcomes.prompts.max()) + 1)[outcomes.prompts] % 2 == 0
    margins = outcomes.margins.copy()
    for part in (half, ~half):
        if part.any() and not part.all():
            margins[part] /= temperature(outcomes.margins[~part], outcomes.label[~part])
    return ece(calibration_statistics(margins, outcomes.right).sum(axis=0))


def ece_if_calibrated(margins: Floats, seed: int) -> float:
    """95% quantile of the ECE of n labels drawn from their own p: below it, nothing speaks against calibration."""
    random = np.random.default_rng([seed, 3])
    hits = random.random((SLOW_RESAMPLES, len(margins))) < expit(np.abs(margins))
    draws = [ece(calibration_statistics(margins, each.astype(np.float64)).sum(axis=0)) for each in hits]
    return float(np.quantile(draws, 0.95))


def by_prompt(statistics: Floats, prompts: np.ndarray[Any, Any]) -> Floats:
    """Statistics of pairs [n, d] added up by prompt, [prompts, d]: the rows that the bootstrap resamples."""
    _, place = np.unique(prompts, return_inverse=True)
    return np.column_stack([np.bincount(place, weights=column) for column in statistics.T])


def share(values: Floats, prompts: np.ndarray[Any, Any], iterations: int, seed: int) -> dict[str, Any]:
    """The mean of values with its 95% interval, and the numbers of values and prompts; None without values."""
    return interval(np.column_stack([values, np.ones(len(values))]), mean_of_sums, prompts, iterations, seed)


def mean_of_sums(sums: Floats) -> float:
    """From [sum, count]."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def interval(
    statistics: Floats,
    score: Callable[[Floats], float],
    prompts: np.ndarray[Any, Any],
    iterations: int,
    seed: int,
) -> dict[str, Any]:
    """A score of summed statistics [n, d] with its 95% interval over resampled prompts, n and the number of prompts."""
    counts = {"n": len(statistics), "prompts": len(np.unique(prompts))}
    if not len(statistics):
        return {"value": None, "low": None, "high": None, **counts}
    measure = Measure(by_prompt(statistics, prompts), lambda sums: {"value": score(sums)})
    low, high = (None, None)
    if counts["prompts"] > 1:  # one prompt has nothing to be compared with
        low, high = bootstrap_intervals(measure, iterations, seed)["value"]
    return _finite({"value": measure.scores()["value"], "low": low, "high": high, **counts})


def slow_interval(
    score: Callable[[Floats], float], prompts: np.ndarray[Any, Any], iterations: int, seed: int
) -> dict[str, Any]:
    """As `interval`, of a score that is computed anew from how often each value is drawn, [n], in each resample."""
    _, place = np.unique(prompts, return_inverse=True)
    number = int(place.max()) + 1
    random = np.random.default_rng([seed, 4])
    draws = [
        score(np.bincount(random.integers(0, number, number), minlength=number)[place].astype(np.float64))
        for _ in range(min(SLOW_RESAMPLES, iterations) if number > 1 else 0)
    ]
    low, high = (None, None)
    if draws and not np.isnan(draws).all():
        low, high = (float(each) for each in np.nanpercentile(draws, [2.5, 97.5]))
    counts = {"n": len(prompts), "prompts": number}
    return _finite({"value": score(np.ones(len(prompts))), "low": low, "high": high, **counts})


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """A measurement with None in place of NaN, which JSON does not have."""
    return {name: None if value is not None and math.isnan(value) else value for name, value in found.items()}


def paired_difference(
    right: Floats, other: Floats, prompts: np.ndarray[Any, Any], iterations: int, seed: int
) -> dict[str, Any]:
    """Accuracy of one predictor less that of another on the same pairs: interval and p-value over prompts."""
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
    """Accuracy of the decided pairs, and NLL, Brier, ECE and temperature of all pairs, ties included."""
    decided = outcomes.decided
    label, prompts, margins = outcomes.label, outcomes.prompts, outcomes.margins
    found: dict[str, Any] = {
        "accuracy": share(decided.right, decided.prompts, iterations, seed),
        "nll": share(nll(margins, label), prompts, iterations, seed),
        "brier": share(brier(margins, label), prompts, iterations, seed),
        "ece": interval(calibration_statistics(margins, outcomes.right), ece, prompts, iterations, seed),
        "ties_in_data": int(outcomes.ties.sum()),
        "ties_in_scores": int((margins == 0).sum()),
    }
    found["ece"]["if_calibrated"] = ece_if_calibrated(margins, seed)
    found["temperature"] = slow_interval(
        lambda weights: temperature(margins, label, weights), prompts, iterations, seed
    )
    found["ece_after_temperature"] = calibrated_ece(outcomes, seed)
    found["reliability"] = reliability(outcomes)
    most = len(np.histogram_bin_edges(margins, "sturges")) - 1
    counts, edges = np.histogram(margins, bins=2 * most)
    found["margins"] = {"counts": counts.tolist(), "edges": edges.tolist()}
    return found
