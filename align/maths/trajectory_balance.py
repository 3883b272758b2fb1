"""Trajectory balance with the variance over a prompt's responses (VarGrad, arXiv 2010.10436; of language models: 2503.18929).

The optimum of J = E[score] - beta KL(pi || ref) is pi*(y) = ref(y) exp(score(y) / beta) / Z, at which the excess

    d(y) = score(y) - beta (log pi(y) - log ref(y))

is beta log Z for every response y to a prompt. So the variance of d over any responses is 0 there, whatever policy sampled
them: no correction is needed for responses of earlier policies. Where a prompt has a single response, an estimate of beta
log Z takes the place of the mean.

Path consistency (arXiv 1702.08892) asks the same of the rest of a response from every token t on: at the optimum the reward to
go less beta times the log-ratios to go is beta log Z of the state before t, which a value model estimates.
"""

from __future__ import annotations

from torch import Tensor


def leave_one_out_excess(scores: Tensor, kl: Tensor, kl_coef: float, group_size: int) -> Tensor:
    """d of each response less the mean d of the others of its prompt, [B], in units of score.

    Args:
        scores: [B]; the K = `group_size` responses to a prompt are consecutive rows.
        kl: [B], log pi - log ref of each response under the policy as it is now, nats.
        kl_coef: beta, score per nat.
    """
    groups = (scores - kl_coef * kl).view(-1, group_size)
    deviations = groups - groups.mean(dim=1, keepdim=True)
    return deviations.flatten() * (group_size / (group_size - 1))


def path_advantages(residuals: Tensor, mask: Tensor) -> Tensor:
    """The negative gradient of `path_loss`, times beta and the number of responses, by log pi of each token: [B, T].

    A token is part of the paths from all tokens before it, and from itself.

    Args:
        residuals: [B, T], reward to go less beta times the log-ratios to go, less the value; 0 outside the mask.
        mask: [B, T].
    """
    return residuals.cumsum(dim=1) / mask.sum(dim=1, keepdim=True) * mask


def path_loss(residuals: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Mean over responses of the mean squared residual of their tokens, divided by 2 beta: a scalar, in units of score."""
    return (residuals.square().sum(dim=1) / mask.sum(dim=1)).mean() / (2 * kl_coef)


def balance_loss(excess: Tensor, kl_coef: float, group_size: int) -> Tensor:
    """Mean over prompts of the unbiased variance of d over its K responses, divided by 2 beta: a scalar, in units of score.

    Of single responses it is the mean of (d - V)^2, divided by 2 beta.

    Its gradient is that of -mean(excess * log pi), excess held fixed: REINFORCE of J with the mean of the other responses as
    baseline. (The gradient of a group's mean d cancels, since the deviations from it sum to 0.)

    Args:
        excess: [B] from `leave_one_out_excess`; with K = 1, d - V, where V estimates beta log Z of the prompt.
    """
    unbiased = (group_size - 1) / group_size if group_size > 1 else 1.0
    return excess.square().mean() * unbiased / (2 * kl_coef)
