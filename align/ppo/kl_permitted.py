"""What `kl_coef` permits, given the spread of the SFT model's scores: one line before the first update."""

from __future__ import annotations

import math

from torch import Tensor

from align.config.ppo import PPORecipe

LEAST_KL = 1.0  # nats per response: with less, hardly anything changes
MOST_KL = 100.0  # with more, the coefficient is no limit


def spreads(scores: Tensor, each: int) -> tuple[float, float]:
    """Standard deviation of scores [n], and that within a prompt, of which `each` consecutive rows are responses."""
    groups = scores[: len(scores) // each * each].reshape(-1, each).double()
    return float(scores.double().std(correction=0)), float(groups.var(dim=1, correction=1).mean().sqrt())


def permitted_kl(within: float, kl_coef: float) -> float:
    """KL of the best policy, nats per response, were the scores of a prompt normally distributed: (within / kl_coef)^2 / 2.

    The best policy is then the SFT model tilted by exp(score / kl_coef), whose mean score is within^2 / kl_coef higher.
    """
    return (within / kl_coef) ** 2 / 2


def describe_kl_coef(recipe: PPORecipe, spread: float, within: float) -> tuple[str, str]:
    """What the coefficient permits, and the remedy where it forbids nearly everything or nothing; else an empty text.

    Args:
        spread, within: as from `spreads`, in units of score.
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
    if kl < LEAST_KL:
        remedy = "lower it" if recipe.scores_are_normalized else "lower it, or set normalize_scores: true"
        return line, f", hardly any change: {remedy}"
    return line, ", which is hardly a limit: raise it, or set max_kl" * (kl > MOST_KL)
