"""One PPO update, in the order of the paper (arXiv 1707.06347; for language models 1909.08593, 2009.01325, 2203.02155).

Letters: B responses make an update, of which this rank samples and scores b = B / ranks; Q prompt tokens, T response tokens,
S = Q + T; m responses are one microbatch. Once they are scored every rank holds all B, so that whitening and minibatches
are those of one process; only forward and backward passes are distributed. Words: a *score* is what the reward sources give
to a response, a *reward* what a token gets once the KL penalty (nats) is subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.data.batches import PromptLoader
from align.generation.sampler import PromptBatch
from align.maths import advantages as estimators
from align.maths.advantages import token_rewards
from align.maths.estimators import ESTIMATORS
from align.maths.kl import adapted_kl_coef, k1
from align.maths.masked import masked_whiten
from align.ppo.metrics import response_kl, rollout_metrics
from align.ppo.rollout import Rollout, gather_rollout, sample_responses, score_responses
from align.ppo.run import PPORun
from align.ppo.update import optimize

# Log-probabilities this close (nats) differ by rounding only; they are compared in every 16th update.
SAME_LOGPROB, COMPARE_EVERY = 1e-5, 16


def step(run: PPORun, update: int) -> dict[str, float]:
    """Sample, score, estimate advantages, optimize. Returns the metrics of the update, which counts from 0."""
    prompts = draw_prompts(run, update)  # b prompts of at most Q tokens
    samples = sample_responses(run, prompts)  # response_ids, mask, logprobs [b, T]
    rescore = rescoring_is_due(run, update)
    scored = score_responses(run, samples, rescore)  # old_logprobs, ref_logprobs, values [b, T]; scores [b]
    rollout = gather_rollout(scored, run.world, run.sampler.pad_token_id)  # the same of all ranks, [B, T] and [B]
    note_sampler_gap(run, rollout, rescore)
    scores = shape_scores(run, rollout)  # [B]
    rewards = compute_rewards(run, rollout, scores)  # [B, T]
    advantages, returns = estimate_advantages(run, rollout, rewards)  # [B, T], [B, T]
    metrics = rollout_metrics(run, rollout, returns)
    metrics |= optimize(run, rollout, advantages, returns, update)  # epochs x minibatches x microbatches of [m, S]
    update_average(run, update)
    adapt_kl_coef(run, rollout)
    return metrics


def draw_prompts(run: PPORun, update: int) -> PromptBatch:
    """This rank's share of the prompts of an update, each `num_generations` times in a row."""
    size, each = run.recipe.rollout_batch_size, run.recipe.num_generations
    loader = PromptLoader(len(run.prompts), run.recipe.seed)
    drawn = [run.prompts[index] for index in loader.batch(update, size // each) for _ in range(each)]
    share = size // run.world.size
    mine = slice(run.world.rank * share, (run.world.rank + 1) * share)
    episodes = range(update * size, (update + 1) * size)
    return PromptBatch([p for p, _ in drawn[mine]], [ids for _, ids in drawn[mine]], "train", episodes[mine])


def rescoring_is_due(run: PPORun, update: int) -> bool:
    """Whether the policy scores its own responses, by the forward pass of training.

    Not where the decoding loop proved to give the same log-probabilities (in float32), but for a comparison now and then.
    """
    return not run.progress.sampler_gap <= SAME_LOGPROB or update % COMPARE_EVERY == 0  # NaN is due, too


def note_sampler_gap(run: PPORun, rollout: Rollout, rescored: bool) -> None:
    """Remember how far log-probabilities of the decoding loop are from those of training, nats, if both are known."""
    if rescored:
        gap = (rollout.sampled_logprobs - rollout.old_logprobs).abs()
        run.progress.sampler_gap = float(gap.masked_fill(~rollout.mask, 0.0).max())


def shape_scores(run: PPORun, rollout: Rollout) -> Tensor:
    """Scores as they enter the rewards, [B]: normalized by their running moments, then clipped, as the recipe says."""
    scores = rollout.scores
    if run.recipe.normalize_scores:
        moments = run.progress.score_moments = run.progress.score_moments.include(scores)
        scores = (scores - moments.mean) / max(moments.std, 1e-8)
    if run.recipe.score_clip is not None:
        scores = scores.clamp(-run.recipe.score_clip, run.recipe.score_clip)
    return scores


def compute_rewards(run: PPORun, rollout: Rollout, scores: Tensor) -> Tensor:
    """Scores [B] to rewards [B, T]: the KL penalty on each token, its own score if it has one, the rest on the last token."""
    kl = k1(rollout.old_logprobs, rollout.ref_logprobs)
    kl_coef = 0.0 if run.recipe.use_kl_loss else run.progress.kl_coef
    rest = scores - rollout.token_scores.sum(dim=1)
    rewards = token_rewards(rest, kl, rollout.mask, kl_coef) + rollout.token_scores
    if run.recipe.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
    return rewards


def estimate_advantages(run: PPORun, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [B, T] to advantages and returns [B, T], 0 outside the mask.

    Advantages of GAE are whitened over the rollout; without a value model returns are 0.
    """
    recipe, mask = run.recipe, rollout.mask
    estimate = getattr(estimators, recipe.advantage_estimator)
    if ESTIMATORS[recipe.advantage_estimator].value_model:
        advantages, returns = estimate(rewards, rollout.values, mask, recipe.gamma, recipe.lam)
        return masked_whiten(advantages, mask), returns
    advantages = estimate(rewards, mask, recipe.num_generations, recipe.gamma)
    return advantages, torch.zeros_like(advantages)


def update_average(run: PPORun, update: int) -> None:
    """Move the exponential moving average of the policy, if there is one, once the policy trains."""
    if run.ema is not None and update >= run.recipe.value_warmup_updates:
        run.ema.update()


def adapt_kl_coef(run: PPORun, rollout: Rollout) -> None:
    """Set the KL coefficient of the next update by the KL of this one, where the recipe has a target."""
    recipe, progress = run.recipe, run.progress
    if recipe.kl_target is not None:
        kl = float(response_kl(rollout).mean())
        progress.kl_coef = adapted_kl_coef(progress.kl_coef, kl, recipe.kl_target, len(rollout), recipe.kl_horizon)
