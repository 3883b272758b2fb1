"""Gain in true reward of an optimized policy by d, the root of its KL divergence from the start (arXiv 2210.10760)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rl_gain(d: Tensor, a: float, b: float) -> Tensor:
    """The law of RL, d (a - b ln d), 0 at d = 0; the shape of `d`."""
    gain: Tensor = d * a - b * torch.special.xlogy(d, d)
    return gain


def fit_rl_gain(d: Tensor, gain: Tensor) -> tuple[float, float]:
    """a and b of `rl_gain` by least squares, in which it is linear, for points [n] with two or more different d above 0."""
    columns = torch.stack([d, -torch.special.xlogy(d, d)], dim=1).double()  # [n, 2]
    a, b = torch.linalg.lstsq(columns, gain.double()[:, None]).solution[:, 0].tolist()
    return a, b


def rl_peak(a: float, b: float) -> tuple[float, float] | None:
    """d at the highest gain under RL, exp(a / b - 1), and that gain, b d; None where there is no peak."""
    if b <= 0 or a / b > 700:  # beyond the range of exp
        return None
    d = math.exp(a / b - 1)
    return d, b * d


def best_of_n_peak(a: float, b: float) -> tuple[float, float]:
    """The same for best-of-n, whose gain is d (a - b d), b above 0."""
    return a / (2 * b), a * a / (4 * b)
