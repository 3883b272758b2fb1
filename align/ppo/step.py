"""One update of PPO: sample, shape the scores, estimate advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align.config.ppo import PPORecipe
from align.data.batches import PromptLoader
from align.data.rows import Prompt
from align.engine.distributed import World
from align.generation.sampler import Sampler
from align.maths.advantages import CRITIC_FREE, gae, token_rewards
from align.maths.kl import k1
from align.maths.masked import masked_whiten
from align.ppo.checkpoint import Progress
from align.ppo.rollout import Rollout, collect, gather_rollout
from align.ppo.setup import Models

# Log-probabilities this close (nats) are the same but for rounding; they are compared in every so many updates.
SAME_LOGPROB, COMPARE_EVERY = 1e-5, 16


def missing_eos(recipe: PPORecipe, scores: Tensor, ended: Tensor) -> Tensor:
    """What a response that does not end is worth: its score less a penalty, or a constant in its place. All [B]."""
    if recipe.missing_eos_score is not None:
        return scores.masked_fill(~ended, recipe.missing_eos_score)
    return scores - (recipe.missing_eos_penalty or 0.0) * ~ended


def sample_rollout(
    recipe: PPORecipe, world: World, sampler: Sampler, models: Models, prompts: Sequence[tuple[Prompt, list[int]]],
    loader: PromptLoader, update: int, progress: Progress,
) -> Rollout:  # fmt: skip
    """Sample and score this rank's share of the rollout batch; returns everyone's, on every rank.

    The `num_generations` responses to a prompt are rows in succession. Where the generation loop's log-probabilities
    proved to be those of training (float32), the policy's own scoring pass is left out, but for a comparison now and then.
    """
    size, each = recipe.rollout_batch_size, recipe.num_generations
    drawn = [index for index in loader.batch(update, size // each) for _ in range(each)]
    share = size // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    episodes = range(update * size, (update + 1) * size)[mine]
    trusted = progress.sampler_gap <= SAME_LOGPROB and update % COMPARE_EVERY != 0
    rollout = collect(
        world, sampler, models.policy, models.policy, models.reference, models.value, models.rewards,
        [prompts[index] for index in drawn[mine]], "train", list(episodes), lambda s, e: missing_eos(recipe, s, e), trusted,
    )  # fmt: skip
    rollout = gather_rollout(rollout, world, int(sampler.tokenizer.pad_token_id))
    if not trusted:
        gap = (rollout.sampled_logprobs - rollout.old_logprobs).abs()
        progress.sampler_gap = float(gap.masked_fill(~rollout.mask, 0.0).max())
    return rollout


def shape_scores(recipe: PPORecipe, rollout: Rollout, progress: Progress) -> Tensor:
    """Scores as they enter the rewards, [B]: normalised by their running moments, then clipped, as the recipe says."""
    scores = rollout.scores
    if recipe.normalize_scores:
        moments = progress.score_moments = progress.score_moments.include(scores)
        scores = (scores - moments.mean) / max(moments.std, 1e-8)
    if recipe.score_clip is not None:
        scores = scores.clamp(-recipe.score_clip, recipe.score_clip)
    return scores


def estimate_advantages(recipe: PPORecipe, rollout: Rollout, scores: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, T]; those of GAE whitened, and returns 0 where there is no value model.

    What single tokens were given stays on them; the last one gets the rest of the response's score.
    """
    kl = k1(rollout.old_logprobs, rollout.ref_logprobs)
    rest = scores - rollout.token_scores.sum(dim=1)
    rewards = token_rewards(rest, kl, rollout.mask, 0.0 if recipe.use_kl_loss else kl_coef) + rollout.token_scores
    if recipe.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
    if recipe.advantage_estimator == "gae":
        advantages, returns = gae(rewards, rollout.values, rollout.mask, recipe.gamma, recipe.lam)
        return masked_whiten(advantages, rollout.mask), returns
    estimate = CRITIC_FREE[recipe.advantage_estimator]
    advantages = estimate(rewards, rollout.mask, recipe.num_generations, recipe.gamma)
    return advantages, torch.zeros_like(advantages)
