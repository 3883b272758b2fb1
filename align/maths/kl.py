"""KL divergence between policy and reference, in nats: estimators from sampled tokens, and the adaptive penalty."""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = log pi - log ref, elementwise: unbiased, of either sign (http://joschu.net/blog/kl-approx.html).

    The one estimator that is right inside a reward: the gradient of its expectation is that of KL(pi || ref)
    (arXiv 2510.01555). As a loss its expected gradient is 0.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2, elementwise: biased as a number, but as a loss its expected gradient is that of KL(pi || ref)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d, elementwise: unbiased, never negative, of low variance near 0.

    As a loss its expected gradient is that of KL(ref || pi), the other direction. Inside a reward it is wrong: the
    penalty's gradient is then grad KL(pi || ref) - grad KL(ref || pi), which vanishes near the reference.
    """
    difference = logprobs - ref_logprobs
    return torch.exp(-difference) - 1 + difference


LOSS_ESTIMATORS = {"k2": k2, "k3": k3}


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The coefficient for the next update: kl_coef (1 + e n / horizon), e = clip(kl / target - 1, -0.2, 0.2).

    arXiv 1909.08593 section 2.2, in the form of lm-human-preferences `train_policy.py`.

    Args:
        kl: mean over responses of the sum over tokens of k1, nats per response, under `kl_coef`.
        target: where it should be, nats per response.
        episodes: n, responses of the update.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
