"""Metrics of updates and evaluations, under the names that `align/runs/metrics.md` documents."""

from __future__ import annotations

import torch
from torch import Tensor

from align.maths.masked import masked_mean, masked_var
from align.ppo.ppo_run import PPORun
from align.ppo.rollout import Rollout
from reward_models.combine import RewardSum
from reward_models.ensemble import disagreement


def rollout_metrics(run: PPORun, rollout: Rollout, returns: Tensor | None = None) -> dict[str, float]:
    """Metrics of a rollout and its returns [B, T], if there is a value model, before the optimizer steps."""
    kl = response_kl(rollout, run.recipe.one_step_off_policy)
    metrics = {
        **response_metrics(rollout, run.models.rewards, ""),
        "objective/score_std": float(rollout.scores.std(correction=0)),
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": run.progress.kl_coef,
        "objective/reward": float((rollout.scores - run.raw_score_kl_coef * kl).mean()),
        "policy/sampler_gap": run.progress.sampler_gap,
    }
    if run.models.value is not None and returns is not None:
        metrics |= value_metrics(rollout, returns)
    return metrics


def value_metrics(rollout: Rollout, returns: Tensor) -> dict[str, float]:
    """How well the value model predicted the returns [B, T]."""
    unexplained = masked_var(returns - rollout.values, rollout.mask)
    return {
        "value/mean": float(masked_mean(rollout.values, rollout.mask)),
        "value/explained_variance": 1.0 - float(unexplained / masked_var(returns, rollout.mask).clamp(min=1e-8)),
        "advantage/std": float(unexplained.sqrt()),
    }


def response_kl(rollout: Rollout, off_policy: bool = False) -> Tensor:
    """Sum of log pi - log ref over the tokens of each response, [B] nats: an unbiased estimate of the KL.

    Args:
        off_policy: an earlier policy q sampled. Each token then counts pi / q times, without which the estimate is
            KL(q || ref) - KL(q || pi), below 0 where q is the reference. The prefixes are still those of q.
    """
    kl = rollout.old_logprobs - rollout.ref_logprobs
    if off_policy:
        kl = kl * (rollout.old_logprobs - rollout.sampled_logprobs).exp()
    return kl.masked_fill(~rollout.mask, 0.0).sum(dim=1)


def response_metrics(rollout: Rollout, rewards: RewardSum, prefix: str) -> dict[str, float]:
    """Means over the responses of a rollout; `prefix` is `eval`, or empty for the names of training."""
    score, response = (f"{prefix}/", f"{prefix}/") if prefix else ("objective/", "response/")
    metrics = {
        f"{score}score": float(rollout.scores.mean()),
        f"{response}length": float(rollout.lengths.float().mean()),
        f"{response}eos_rate": float(rollout.ended.float().mean()),
        f"{response}repetition": float(rollout.repetition.mean()),
    }
    for column, name in enumerate(rewards.names):
        metrics[f"{score}score/{name}"] = float(rollout.source_scores[:, column].nanmean())
    for ensemble, scores in member_scores(rollout, rewards).items():
        metrics[f"{score}disagreement/{ensemble}"] = float(disagreement(scores).mean())
    return metrics


def score_length_correlation(*rollouts: Rollout) -> float:
    """Pearson correlation of score and length over the responses of these rollouts; NaN if either is constant."""
    scores = torch.cat([rollout.scores for rollout in rollouts]).double()
    lengths = torch.cat([rollout.lengths for rollout in rollouts]).double()
    return float(torch.corrcoef(torch.stack([scores, lengths]))[0, 1])


def member_scores(rollout: Rollout, rewards: RewardSum) -> dict[str, Tensor]:
    """Scores of the members of each ensemble by its name, [k, B]."""
    columns = dict(zip(rewards.names, rollout.source_scores.T, strict=True))
    return {each.name: torch.stack([columns[name] for name in each.member_names]) for each in rewards.ensembles}
