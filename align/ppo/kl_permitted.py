"""An estimate of the KL that `kl_coef` permits, from the spread of the SFT model's scores; printed before the first update."""

from __future__ import annotations

import math

from torch import Tensor

from align.config.ppo import PPORecipe

MIN_KL = 1.0  # nats per response; below, the policy hardly changes
MAX_KL = 100.0  # above, the coefficient is no limit


def score_stds(scores: Tensor, each: int) -> tuple[float, float]:
    """Standard deviation of scores [n] over all rows and within prompts.

    Args:
        each: number of consecutive rows that are responses to one prompt.
    """
    groups = scores[: len(scores) // each * each].reshape(-1, each).double()
    return float(scores.double().std(correction=0)), float(groups.var(dim=1, correction=1).mean().sqrt())


def permitted_kl(within: float, kl_coef: float) -> float:
    """KL of the optimal policy in nats per response, if the scores of a prompt are normal: (within / kl_coef)^2 / 2.

    The optimal policy is the SFT model tilted by exp(score / kl_coef); its mean score is within^2 / kl_coef higher.
    """
    return (within / kl_coef) ** 2 / 2


def describe_kl_coef(recipe: PPORecipe, spread: float, within: float) -> tuple[str, str]:
    """A line on the KL that the coefficient permits, and a remedy if that is too little or too much, else an empty text.

    Args:
        spread, within: from `score_stds`, in units of the score.
    """
    unit = "standard deviations of the score" if recipe.scores_are_normalized else "score"
    line = f"kl_coef {recipe.kl_coef:g} {unit} per nat; the SFT model's scores spread by {spread:.3g}, {within:.3g} within a prompt"
    if not within > 0:
        return line, ": there is nothing to learn"
    if not recipe.kl_coef:
        return line, ": nothing holds the policy near the SFT model"
    kl = permitted_kl(within / (spread if recipe.scores_are_normalized else 1.0), recipe.kl_coef)
    line += f": it permits about {kl:.2g} nats per response"
    if recipe.kl_target is not None:
        factor = math.pow(1 + 0.2 * recipe.rollout_batch_size / recipe.kl_horizon, recipe.num_updates)
        line += f", and kl_target {recipe.kl_target:g} changes it by at most {factor:.4g} times in this run"
        too_slow = max(kl / recipe.kl_target, recipe.kl_target / kl) > factor**2  # KL goes with 1 / kl_coef^2
        return line, " (too little to get there: lower kl_horizon)" * too_slow
    if kl < MIN_KL:
        remedy = "lower it" if recipe.scores_are_normalized else "lower it, or set normalize_scores: true"
        return line, f", hardly any change: {remedy}"
    return line, ", which is hardly a limit: raise it, or set max_kl" * (kl > MAX_KL)
