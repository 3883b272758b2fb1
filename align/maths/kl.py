"""Estimators of KL(policy || reference) from sampled tokens, in nats. http://joschu.net/blog/kl-approx.html"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref, elementwise: unbiased, of either sign.

    The one estimator that is right inside a reward: the gradient of its expectation is the gradient of
    the KL divergence (arXiv 2510.01555).
    """
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d with d = log pi - log ref, elementwise: unbiased, never negative, of low variance near 0."""
    difference = logprobs - ref_logprobs
    return torch.exp(-difference) - 1 + difference
