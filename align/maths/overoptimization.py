"""Gain in true reward of an optimized policy by d, the root of its KL divergence from the start (arXiv 2210.10760).

On plain numbers, without torch: a report draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rl_gain(d: float, a: float, b: float) -> float:
    """The law of RL, d (a - b ln d), 0 at d = 0."""
    return d * (a - b * math.log(d)) if d > 0 else 0.0


def fit_rl_gain(d: Sequence[float], gain: Sequence[float]) -> tuple[float, float] | None:
    """a and b of `rl_gain` by least squares, in which it is linear; None without two or more different d above 0."""
    pairs = [(x, y) for x, y in zip(d, gain, strict=True) if x > 0]
    rows = [(x, -x * math.log(x), y) for x, y in pairs]
    aa, ab, bb = (math.fsum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    ya, yb = (math.fsum(row[i] * row[2] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant <= 1e-12 * aa * bb:  # one distance
        return None
    return (bb * ya - ab * yb) / determinant, (aa * yb - ab * ya) / determinant


def rl_peak(a: float, b: float) -> tuple[float, float] | None:
    """d at the highest gain under RL, exp(a / b - 1), and that gain, b d; None where there is no peak."""
    if b <= 0 or a / b > 700:  # beyond the range of exp
        return None
    d = math.exp(a / b - 1)
    return d, b * d


def best_of_n_peak(a: float, b: float) -> tuple[float, float]:
    """The same for best-of-n, whose gain is d (a - b d), b above 0."""
    return a / (2 * b), a * a / (4 * b)
