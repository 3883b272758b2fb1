"""Judging a model: intervals, accuracies, win rates, degeneration, and tables of them. The only importer of evaluate.

Importing evaluate takes seconds and loads half of the data stack, hence inside the one function that needs it.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Sequence
from typing import Any


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share by E. B. Wilson (1927), JASA 22; at z = 1.96 it holds 95%.

    Unlike p +- z s it is right at small n and never leaves [0, 1].

    Args:
        successes: 0 to n; half successes (ties) are allowed.

    Raises:
        ValueError: `successes` is not between 0 and n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes: expected 0 to n = {n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def preference_accuracy(chosen_scores: Sequence[float], rejected_scores: Sequence[float]) -> dict[str, float]:
    """Share of pairs whose chosen response has the higher score, ties counting 1/2, with its 95% interval.

    Args:
        chosen_scores, rejected_scores: one score per pair, in the same order.

    Returns:
        accuracy, low, high, n.

    Raises:
        ValueError: no pairs, lists of different lengths, or a NaN.
    """
    _check_pairs(chosen_scores, rejected_scores)
    with tempfile.TemporaryDirectory() as folder:  # evaluate makes a folder even when all is kept in memory
        metric = _preference_metric()(keep_in_memory=True, cache_dir=folder)
        result: dict[str, float] = metric.compute(chosen=list(chosen_scores), rejected=list(rejected_scores))
    return result


@functools.cache
def _preference_metric() -> Any:
    import datasets
    import evaluate

    class PreferenceAccuracy(evaluate.Metric):  # type: ignore[misc]
        """Local, because `evaluate.load` asks the hub even for what is installed."""

        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description="Share of preference pairs ranked as the annotators ranked them; ties count 1/2.",
                citation="",
                inputs_description="chosen, rejected: the scores of each pair's responses.",
                features=datasets.Features(
                    {"chosen": datasets.Value("float64"), "rejected": datasets.Value("float64")}
                ),
            )

        def _compute(self, chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float]:
            wins = _wins(chosen, rejected)
            low, high = wilson_interval(wins, len(chosen))
            return {"accuracy": wins / len(chosen), "low": low, "high": high, "n": len(chosen)}

    return PreferenceAccuracy


def win_rate(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Share of prompts on which `a` scores above `b`, ties counting 1/2, with its 95% interval.

    Args:
        a, b: scores of the two models' responses to the same prompts, in the same order.

    Returns:
        win_rate, low, high, n.

    Raises:
        ValueError: no prompts, lists of different lengths, or a NaN.
    """
    _check_pairs(a, b)
    wins = _wins(a, b)
    low, high = wilson_interval(wins, len(a))
    return {"win_rate": wins / len(a), "low": low, "high": high, "n": len(a)}


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"scores: expected as many of one as of the other, and some, got {len(a)} and {len(b)}")
    if any(math.isnan(score) for score in [*a, *b]):
        raise ValueError("scores: expected numbers, got NaN")


def _wins(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True))


def repetition(text: str) -> float:
    """Share of word 3-grams that occurred earlier in the text; 0 for fewer than three words."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
