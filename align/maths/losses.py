"""PPO's losses per token. The objective of a minibatch is their sum, weighted by `loss_weights` of the minibatch.

A mean taken here would depend on how a minibatch is cut into microbatches and distributed over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align.maths.estimators import Aggregation


class PolicyLoss(NamedTuple):
    """`loss` [n] carries the gradient; the others are sums."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor


class ValueLoss(NamedTuple):
    """`loss` [B, T], 0 outside the mask, carries the gradient; `clipped` is a sum over real tokens."""

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


def loss_weights(mask: Tensor, aggregation: Aggregation, length: int) -> Tensor:
    """The weight of each token's loss in the objective of one minibatch, [B, T] float32, 0 outside the mask.

    Args:
        mask: [B, T] of the minibatch of all ranks, so that the weights do not depend on microbatches and ranks.
        aggregation: "token_mean" gives every token the same weight, 1 / tokens; "sequence_mean" every response, 1 / (B
            |y|), so that the tokens of short responses count for more; "constant" 1 / (B length) (arXiv 2503.20783).
        length: the most tokens that a response may have.
    """
    if aggregation == "token_mean":
        return mask / mask.sum()
    if aggregation == "sequence_mean":
        return mask / (mask.sum(dim=1, keepdim=True) * len(mask))
    return mask / (len(mask) * length)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float, dual_clip: float | None = None
) -> PolicyLoss:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = pi / pi_old (arXiv 1707.06347 eq. 7), of real tokens. All [n].

    Args:
        dual_clip: a bound > 1 on rho where A < 0, above which a token has no gradient (arXiv 1912.09729 eq. 5).
    """
    difference = logprobs - old_logprobs
    ratio = difference.exp()
    unclipped = -advantages * ratio
    loss = torch.maximum(unclipped, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))
    cut = loss > unclipped
    if dual_clip is not None:
        bound = -advantages * dual_clip
        cut = cut | ((advantages < 0) & (loss > bound))
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    return PolicyLoss(
        loss=loss,
        ratio=ratio.detach().sum(),
        clipped=cut.sum().float(),
        approx_kl=0.5 * (difference.detach() ** 2).sum(),
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) (lm-human-preferences `train_policy.py`). All [B, T]."""
    bounded = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    unclipped = (values - returns) ** 2
    clipped = (bounded - returns) ** 2
    return ValueLoss(
        loss=0.5 * torch.maximum(unclipped, clipped).masked_fill(~mask, 0.0),
        clipped=((clipped > unclipped) & mask).sum().float(),
    )
