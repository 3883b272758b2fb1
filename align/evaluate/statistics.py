"""Statistics of evaluation results: confidence intervals of shares, preference accuracy, win rate, repetition.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a binomial proportion, E. B. Wilson (1927), JASA 22; 95% at z = 1.96.

    Unlike the normal interval p +- z sqrt(p (1 - p) / n) it holds its level at small n and stays within [0, 1].

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
    return _share_won("accuracy", chosen_scores, rejected_scores)


def win_rate(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Share of prompts on which `a` scores higher than `b`, ties counting 1/2, with its 95% interval.

    Args:
        a, b: scores of two models' responses to the same prompts, in the same order.

    Returns:
        win_rate, low, high, n.

    Raises:
        ValueError: no prompts, lists of different lengths, or a NaN.
    """
    return _share_won("win_rate", a, b)


def _share_won(name: str, a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"scores: expected two lists of the same length, at least 1, got {len(a)} and {len(b)}")
    if any(math.isnan(score) for score in [*a, *b]):
        raise ValueError("scores: expected numbers, got NaN")
    wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True))
    low, high = wilson_interval(wins, len(a))
    return {name: wins / len(a), "low": low, "high": high, "n": len(a)}


def repetition(text: str) -> float:
    """Share of word 3-grams that occurred earlier in the text; 0 for fewer than three words."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
