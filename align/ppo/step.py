"""One PPO update, following PPO (arXiv 1707.06347) as adapted to language models (1909.08593, 2009.01325, 2203.02155).

Letters: B = `rollout_batch_size` responses, of which this rank samples and scores b = B / ranks; Q prompt tokens, padded on the
left, and T response tokens, padded on the right, to the longest of this rank before the gather and of all ranks after it;
S = Q + T; m responses are one microbatch. Masks are True on real tokens, end-of-text included. Sampling, scoring, forward and
backward passes are split over ranks; scores, rewards, advantages and statistics are computed from all B responses by every
rank, so that whitening and minibatches match a single-process run and no rank can disagree.

Words: a *score* is what the reward sources give to a response; a *reward* is the per-token signal that advantages are
estimated from, which includes the KL penalty unless it is part of the loss (`use_kl_loss`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.data.batches import PromptLoader
from align.generation.sampler import PromptBatch
from align.maths import advantages as advantage_functions
from align.maths.advantages import token_rewards
from align.maths.kl import adapted_kl_coef, k1
from align.maths.masked import masked_whiten
from align.ppo.metrics import response_kl, rollout_metrics
from align.ppo.ppo_run import PPORun
from align.ppo.rollout import Rollout, gather_rollout
from align.ppo.sample import sample_responses, score_responses
from align.ppo.scores import normalize_and_clip_scores
from align.ppo.trajectory_balance import balance
from align.ppo.update import optimize, trains_policy

SAME_LOGPROB = 1e-5  # nats: log-probabilities this close differ by rounding only
COMPARE_EVERY = 16  # updates


def step(run: PPORun, update: int) -> dict[str, float]:
    """Sample, score, estimate advantages, optimize. Returns the metrics of the update, whose index is `update`, from 0."""
    prompts = draw_prompts(run, update)  # b prompts of this rank
    samples = sample_responses(run, prompts)  # response_ids, mask, logprobs of the decoding loop [b, T]
    recompute = must_recompute_logprobs(run, update)
    # old and ref logprobs, values if any, token_scores [b, T]; scores [b]
    scored = score_responses(run, samples, recompute)
    rollout = gather_rollout(scored, run.world, run.sampler.pad_token_id)  # [B, T] and [B], identical on every rank
    record_sampler_gap(run, rollout, recompute)
    scores = normalize_and_clip_scores(run, rollout)  # [B]
    if run.replay is not None:  # another objective, on this rollout and earlier ones
        metrics = rollout_metrics(run, rollout)
        metrics |= balance(run, run.replay, rollout, update)
    else:
        rewards = compute_rewards(run, rollout, scores)  # [B, T]
        # [B, T], [B, T]: returns are what values are fitted to
        advantages, returns = estimate_advantages(run, rollout, rewards)
        metrics = rollout_metrics(run, rollout, returns)
        # Losses of policy, value and, in the loss, KL: epochs x minibatches x microbatches of [m, S], split over the ranks.
        metrics |= optimize(run, rollout, advantages, returns, update)
    if trains_policy(run, update):
        update_ema(run)
        adapt_kl_coef(run, rollout)
    return metrics


def draw_prompts(run: PPORun, update: int) -> PromptBatch:
    """This rank's share of the prompts of an update, each repeated `num_generations` times in consecutive rows.

    The sampling noise of a response is seeded by the purpose and the number of its episode, so that it does not depend on
    ranks or restarts.
    """
    size, each = run.recipe.rollout_batch_size, run.recipe.num_generations  # both divide evenly: the recipe is checked
    loader = PromptLoader(len(run.prompts), run.recipe.seed)
    drawn = [run.prompts[index] for index in loader.batch(update, size // each) for _ in range(each)]
    share = size // run.world.size
    mine = slice(run.world.rank * share, (run.world.rank + 1) * share)
    episodes = range(update * size, (update + 1) * size)
    return PromptBatch([p for p, _ in drawn[mine]], [ids for _, ids in drawn[mine]], "train", episodes[mine])


def must_recompute_logprobs(run: PPORun, update: int) -> bool:
    """Whether to recompute the old log-probabilities with the forward pass of training, instead of taking the sampler's.

    Skipped when the two matched at the last comparison, as they do in float32; compared again every `COMPARE_EVERY` updates.
    The gap is that of all ranks, which therefore decide alike.
    """
    matched = run.progress.sampler_gap <= SAME_LOGPROB  # false before the first comparison (infinity) and for NaN
    return not matched or update % COMPARE_EVERY == 0


def record_sampler_gap(run: PPORun, rollout: Rollout, recomputed: bool) -> None:
    """Record the largest difference between the log-probabilities of decoding loop and training, nats, if both are there."""
    if recomputed:
        gap = (rollout.sampled_logprobs - rollout.old_logprobs).abs()
        run.progress.sampler_gap = float(gap.masked_fill(~rollout.mask, 0.0).max())


def compute_rewards(run: PPORun, rollout: Rollout, scores: Tensor) -> Tensor:
    """Normalized and clipped scores [B] to rewards [B, T]: the KL penalty on every token, and the score.

    Scores include those of single tokens, which stay on their tokens as they were given (0 where there are none). The last
    real token receives the rest, so that a row sums to its score less the KL penalty; `whiten_rewards` then divides all
    rewards by their standard deviation.
    """
    kl = k1(rollout.old_logprobs, rollout.ref_logprobs)  # log pi - log ref, [B, T] nats
    kl_coef = 0.0 if run.recipe.use_kl_loss else run.progress.kl_coef
    last_token_scores = scores - rollout.token_scores.sum(dim=1)  # [B]
    rewards = token_rewards(last_token_scores, kl, rollout.mask, kl_coef) + rollout.token_scores
    if run.recipe.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
    return rewards


def estimate_advantages(run: PPORun, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [B, T] to advantages and returns [B, T], 0 outside the mask.

    The estimator is the function of its name in `align.maths.advantages`. With a value model advantages are whitened over
    all tokens of the rollout; without one the estimator scales them itself, and returns are unused, and 0.
    """
    recipe, mask = run.recipe, rollout.mask
    estimate = getattr(advantage_functions, recipe.advantage_estimator)
    if recipe.estimator.value_model:
        advantages, returns = estimate(rewards, rollout.values, mask, recipe.gamma, recipe.lam)
        return masked_whiten(advantages, mask), returns
    advantages = estimate(rewards, mask, recipe.num_generations, recipe.gamma)  # rows are grouped by prompt
    return advantages, torch.zeros_like(advantages)


def update_ema(run: PPORun) -> None:
    """Update the exponential moving average of the policy, if there is one."""
    if run.ema is not None:
        run.ema.update()


def adapt_kl_coef(run: PPORun, rollout: Rollout) -> None:
    """Set the KL coefficient of the next update from this update's KL, if the recipe has a target.

    Not while the policy does not train: its KL of 0 would lower the coefficient.
    """
    recipe, progress = run.recipe, run.progress
    if recipe.kl_target is not None:
        kl = float(response_kl(rollout).mean())  # nats per response
        progress.kl_coef = adapted_kl_coef(progress.kl_coef, kl, recipe.kl_target, len(rollout), recipe.kl_horizon)
