"""Perplexity, exp of the mean negative log-likelihood."""

from __future__ import annotations

import math

MAX_NLL = 700.0  # e^710 overflows a float


def perplexity(mean_nll: float) -> float:
    """exp(`mean_nll`), where `mean_nll` is in nats per token; above 700 nats it stays at exp(700), about 1e304."""
    return math.exp(min(mean_nll, MAX_NLL))
