"""From scores to advantages. B responses, T response tokens; masks are True on real response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from align.maths.masked import last_index


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score on the last real token (arXiv 1909.08593 eq. 2, 2203.02155).

    Args:
        scores: [B], one per response.
        kl: [B, T], nats per token.
        mask: [B, T]; every row has a real token.

    Returns:
        [B, T] float32; each row sums to score - kl_coef * KL of the response. 0 outside the mask.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    return rewards.scatter_add(1, last_index(mask)[:, None], scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438 eq. 16): A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t.

    The value after the last real token is 0: the episode ends there. Padding may hold anything.

    Args:
        rewards, values: [B, T]; `values[:, t]` judges the state before token t.
        mask: [B, T].

    Returns:
        advantages and returns (advantage + value), [B, T], 0 outside the mask.
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following_advantage = torch.zeros_like(rewards[:, 0])
    following_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = delta + gamma * lam * following_advantage
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)
