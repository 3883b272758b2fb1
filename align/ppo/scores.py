"""Normalization of scores: of each source within the responses to a prompt, by running moments, and clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from align.errors import UserError
from align.maths.advantages import missing_eos_scores, normalize_then_sum
from align.ppo.ppo_run import PPORun
from align.ppo.rollout import Rollout


def normalize_and_clip_scores(run: PPORun, rollout: Rollout) -> Tensor:
    """Scores [B] for the rewards: normalized by running moments that include this batch, then clipped.

    Updates the moments in `run.progress`. With `multi_objective_aggregation: normalize_then_sum`, the score of each source is
    first normalized within the responses to a prompt.
    """
    if run.recipe.scores_are_normalized:
        progress = run.progress
        progress.score_moments = progress.score_moments.include(summed_scores(run, rollout))
    return current_scores(run, rollout)


def current_scores(run: PPORun, rollout: Rollout) -> Tensor:
    """Scores [B], normalized by the current moments and clipped; the responses to a prompt are consecutive rows."""
    scores, moments = summed_scores(run, rollout), run.progress.score_moments
    if run.recipe.scores_are_normalized:
        scores = (scores - moments.mean) / max(moments.std, 1e-8)
    if run.recipe.score_clip is not None:
        scores = scores.clamp(-run.recipe.score_clip, run.recipe.score_clip)
    return scores


def summed_scores(run: PPORun, rollout: Rollout) -> Tensor:
    """Scores [B] summed over the reward sources."""
    gdpo = run.recipe.multi_objective_aggregation == "normalize_then_sum"
    return sum_of_normalized_scores(run, rollout) if gdpo else rollout.scores


def sum_of_normalized_scores(run: PPORun, rollout: Rollout) -> Tensor:
    """GDPO's scores [B]: the weighted sum of the sources' normalized scores, after the missing-EOS rule.

    Raises:
        UserError: a source scores tokens, whose sum has another scale.
    """
    if rollout.token_scores.any():
        raise UserError(
            "multi_objective_aggregation: normalize_then_sum takes one score for each response, and a reward function gave one "
            "for each token; use sum_then_normalize."
        )
    recipe, weights = run.recipe, torch.tensor(run.models.rewards.weights, device=rollout.scores.device)
    sources = rollout.source_scores[:, : len(weights)]
    scores = normalize_then_sum(sources, weights, recipe.num_generations)
    return missing_eos_scores(scores, rollout.ended, recipe.missing_eos_penalty, recipe.missing_eos_score)
