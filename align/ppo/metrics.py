"""What an update and an evaluation log."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from align.maths.masked import masked_mean, masked_var
from align.ppo.rollout import Rollout


def rollout_metrics(rollout: Rollout, kl_coef: float, sources: list[str]) -> dict[str, float]:
    """What is known before the update."""
    kl = response_kl(rollout)
    return {
        **summary(rollout, sources, ""),
        "objective/score_std": float(rollout.scores.std(correction=0)),
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": kl_coef,
        "objective/reward": float((rollout.scores - kl_coef * kl).mean()),
    }


def value_metrics(rollout: Rollout, returns: Tensor) -> dict[str, float]:
    """How well the value model foresaw the returns [B, T]."""
    unexplained = masked_var(returns - rollout.values, rollout.mask)
    return {
        "value/mean": float(masked_mean(rollout.values, rollout.mask)),
        "value/explained_variance": 1.0 - float(unexplained / masked_var(returns, rollout.mask).clamp(min=1e-8)),
        "advantage/std": float(unexplained.sqrt()),
    }


def response_kl(rollout: Rollout) -> Tensor:
    """Sum over each response's tokens of log pi - log ref, [B], nats: an unbiased estimate of its KL."""
    return (rollout.old_logprobs - rollout.ref_logprobs).masked_fill(~rollout.mask, 0.0).sum(dim=1)


def summary(rollout: Rollout, sources: Sequence[str], prefix: str) -> dict[str, float]:
    """Means over the responses of a rollout; `prefix` is `eval`, or empty for the names of training."""
    score, response = (f"{prefix}/", f"{prefix}/") if prefix else ("objective/", "response/")
    metrics = {
        f"{score}score": float(rollout.scores.mean()),
        f"{response}length": float(rollout.lengths.float().mean()),
        f"{response}eos_rate": float(rollout.ended.float().mean()),
        f"{response}repetition": float(rollout.repetition.mean()),
    }
    for column, name in enumerate(sources):
        metrics[f"{score}score/{name}"] = float(rollout.source_scores[:, column].nanmean())
    return metrics
