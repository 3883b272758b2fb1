"""From scores to advantages. B responses of up to T tokens; masks are True on real response tokens.

The function of an advantage estimator has the name that `advantage_estimator` gives it in a recipe, and a line in
`align.maths.estimators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.maths.masked import last_index, masked_whiten


def missing_eos_scores(scores: Tensor, ended: Tensor, penalty: float | None, constant: float | None) -> Tensor:
    """Scores of responses that do not end with EOS: less `penalty`, or replaced by `constant`. [B] float32, [B] bool -> [B]."""
    if constant is not None:
        return scores.masked_fill(~ended, constant)
    return scores - (penalty or 0.0) * ~ended


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
    """Generalized advantage estimation (arXiv 1506.02438 eq. 16): A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t.

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


def normalize_then_sum(scores: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """GDPO (arXiv 2601.05242): each reward less its mean over the K responses to a prompt, over its std there; weighted sum.

    The std is the population's. A reward that is the same for all of a group, or NaN (it does not apply), adds 0.

    Args:
        scores: [B, n] of n rewards; the K responses to a prompt are consecutive rows.
        weights: [n].

    Returns:
        [B] float32, with mean 0 in every group.
    """
    groups = scores.view(-1, group_size, scores.shape[1])
    deviations = groups - groups.nanmean(dim=1, keepdim=True)
    std = deviations.square().nanmean(dim=1, keepdim=True).sqrt()
    normalized = torch.where(std > 1e-6 * groups.abs().nan_to_num().amax(dim=1, keepdim=True), deviations / std, 0.0)
    return normalized.nan_to_num().flatten(0, 1) @ weights


# Estimators without a value model: (rewards [B, T], mask [B, T], group_size K, gamma) -> advantages [B, T], 0 outside the
# mask. The K responses to a prompt are consecutive rows.


def rloo(rewards: Tensor, mask: Tensor, group_size: int, gamma: float) -> Tensor:
    """REINFORCE leave-one-out: a response's summed reward less the mean of the others of its prompt (arXiv 2402.14740)."""
    groups = _group_sums(rewards, mask, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) * group_size / (group_size - 1)
    return _on_tokens(advantages, mask)


def grpo(rewards: Tensor, mask: Tensor, group_size: int, gamma: float) -> Tensor:
    """(R - mean) / (std + 1e-4) over the responses to a prompt, std unbiased (arXiv 2402.03300; TRL's constants)."""
    groups = _group_sums(rewards, mask, group_size)
    deviations = groups - groups.mean(dim=1, keepdim=True)
    return _on_tokens(deviations / (groups.std(dim=1, keepdim=True) + 1e-4), mask)


def dr_grpo(rewards: Tensor, mask: Tensor, group_size: int, gamma: float) -> Tensor:
    """R - mean over the responses to a prompt, without the std, which weighs prompts by difficulty (arXiv 2503.20783)."""
    groups = _group_sums(rewards, mask, group_size)
    return _on_tokens(groups - groups.mean(dim=1, keepdim=True), mask)


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, group_size: int, gamma: float) -> Tensor:
    """Discounted reward to go of each token, whitened over the whole batch (arXiv 2501.03262); prompts need no groups."""
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return masked_whiten(to_go, mask)


def _group_sums(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Each response's summed reward, [B / K, K]."""
    return rewards.masked_fill(~mask, 0.0).sum(dim=1).view(-1, group_size)


def _on_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """One number per response, given to each of its tokens."""
    return advantages.reshape(-1, 1) * mask
