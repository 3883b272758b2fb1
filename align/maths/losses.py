"""The losses of PPO, as sums over real tokens: whoever divides by the global token count makes the mean.

A mean taken here would depend on how a minibatch is cut into microbatches and spread over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Sums over the real tokens of one microbatch, scalars. Only `loss` carries a gradient."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor


class ValueLoss(NamedTuple):
    """Sums over the real tokens of one microbatch, scalars. Only `loss` carries a gradient."""

    loss: Tensor
    clipped: Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature).

    Args:
        logits: [..., V] of any float type; the softmax is taken in float32.
        tokens: [...] int64.

    Returns:
        [...] float32, nats.
    """
    logits = logits.float() / temperature
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of softmax(logits / temperature), [..., V] -> [...] float32, nats."""
    logits = logits.float() / temperature
    return logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> PolicyLoss:
    """sum over tokens of max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = pi / pi_old (arXiv 1707.06347 eq. 7). All [B, T]."""
    difference = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = difference.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return PolicyLoss(
        loss=torch.maximum(unclipped, clipped).masked_fill(~mask, 0.0).sum(),
        ratio=ratio.detach().masked_fill(~mask, 0.0).sum(),
        clipped=((clipped > unclipped) & mask).sum().float(),
        approx_kl=0.5 * (difference.detach() ** 2).sum(),
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> ValueLoss:
    """sum of 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) (lm-human-preferences `train_policy.py`). All [B, T]."""
    bounded = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    unclipped = (values - returns) ** 2
    clipped = (bounded - returns) ** 2
    return ValueLoss(
        loss=0.5 * torch.maximum(unclipped, clipped).masked_fill(~mask, 0.0).sum(),
        clipped=((clipped > unclipped) & mask).sum().float(),
    )
