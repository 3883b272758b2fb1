"""One PPO update, following PPO (arXiv 1707.06347) as adapted to language models (1909.08593, 2009.01325, 2203.02155).

Shapes: B = `rollout_batch_size` responses, of which each rank samples and scores b = B / ranks; Q prompt tokens, padded on the
left; T response tokens, padded on the right; S = Q + T; a microbatch has m responses. Q and T are the longest of this rank
before the gather, and of all ranks after it. Masks are True on real tokens, end-of-text included. Sampling, scoring, forward
and backward passes are split over ranks. Every rank computes scores, rewards, advantages and statistics from all B responses,
so that whitening and minibatches match a single-process run and ranks cannot disagree.

Terms: a *score* is what the reward sources give to a response; a *reward* is the per-token signal that advantages are
estimated from, which includes the KL penalty unless that is part of the loss (`use_kl_loss`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.data.batches import PromptLoader
from align.generation.sampler import PromptBatch
from align.maths import advantages as advantage_functions
from align.maths.advantages import token_rewards
from align.maths.importance import importance
from align.maths.kl import adapted_kl_coef, k1
from align.maths.masked import masked_mean, masked_whiten
from align.ppo.metrics import response_kl, rollout_metrics
from align.ppo.ppo_run import PPORun
from align.ppo.rollout import Rollout, gather_rollout
from align.ppo.sample import sample_responses, score_responses
from align.ppo.scores import normalize_and_clip_scores
from align.ppo.self_check_limits import check_sampler_gap, limits_of
from align.ppo.trajectory_balance import balance_steps
from align.ppo.update import optimize, trains_policy

LOGPROB_TOLERANCE = 1e-5  # nats; smaller differences are rounding
ENGINE_TOLERANCE = 1e-4  # nats; of two engines in float32, whose largest differences are 2e-5
COMPARE_EVERY = 16  # updates between comparisons of the sampler's log-probabilities with those of training


def step(run: PPORun, update: int) -> dict[str, float]:
    """Sample, score, estimate advantages and optimize; returns the metrics of the update.

    Args:
        update: index of the update, from 0.

    Raises:
        UserError: a reward function failed, or the losses of several minibatches in a row were not finite.
    """
    prompts = draw_prompts(run, update)  # b prompts, of this rank
    if run.ahead is None:
        samples = sample_responses(run, prompts)  # response_ids, mask, logprobs of the decoding loop [b, T]
    else:
        following = draw_prompts(run, update + 1) if update + 1 < run.updates else None
        with run.world.clock.phase("generate"):  # what is not over by now
            samples = run.ahead.sample(run.models.policy, prompts, following)
    recompute = must_recompute_logprobs(run, update)  # else old_logprobs are those of the decoding loop
    # old_logprobs, ref_logprobs, values (0 without a value model), token_scores [b, T]; scores [b]
    scored = score_responses(run, samples, recompute)
    rollout = gather_rollout(scored, run.world, run.sampler.pad_token_id)  # [B, T] and [B], identical on every rank
    record_sampler_gap(run, rollout, recompute)
    scores = normalize_and_clip_scores(run, rollout)  # [B]; updates their running mean and standard deviation first
    if run.replay is not None:  # trajectory balance or path consistency, which train on earlier rollouts too
        metrics = rollout_metrics(run, rollout)
        metrics |= balance_steps(run, run.replay, rollout, update)
    else:
        rewards = compute_rewards(run, rollout, scores)  # [B, T]
        # both [B, T]; returns are the targets of the value model
        advantages, returns = estimate_advantages(run, rollout, rewards)
        metrics = rollout_metrics(run, rollout, returns)
        if run.sampler.vllm is not None:
            weights, measured = importance_weights(
                run, rollout
            )  # [B, T], 1 where the sampler's probabilities are the policy's
            advantages = advantages * weights
            metrics |= measured
        # `num_ppo_epochs` x minibatches, an optimizer step of policy and value model each; microbatches [m, S] on each rank
        metrics |= optimize(run, rollout, advantages, returns, update)
    if trains_policy(run, update):  # false during `value_warmup_updates`
        update_ema(run)
        adapt_kl_coef(run, rollout)
    return metrics


def draw_prompts(run: PPORun, update: int) -> PromptBatch:
    """This rank's share of the prompts of an update, each repeated `num_generations` times in consecutive rows.

    The batch carries the purpose ("train") and the episode number of each row, which seed the sampling noise of its response:
    it depends on neither the number of ranks nor restarts.
    """
    size, each = run.recipe.rollout_batch_size, run.recipe.num_generations  # both divide evenly; the recipe is checked
    loader = PromptLoader(len(run.prompts), run.recipe.seed)
    drawn = [run.prompts[index] for index in loader.batch(update, size // each) for _ in range(each)]
    share = size // run.world.size
    mine = slice(run.world.rank * share, (run.world.rank + 1) * share)
    episodes = range(update * size, (update + 1) * size)
    return PromptBatch([p for p, _ in drawn[mine]], [ids for _, ids in drawn[mine]], "train", episodes[mine])


def must_recompute_logprobs(run: PPORun, update: int) -> bool:
    """Whether to recompute the old log-probabilities with the forward pass of training instead of using the sampler's.

    Not necessary if the two agreed at the last comparison, as they do in float32; every `COMPARE_EVERY` updates they are
    compared again. The gap is the largest of all ranks, so that all decide alike. vLLM's are never used.
    """
    matched = run.progress.sampler_gap <= LOGPROB_TOLERANCE  # false before the first comparison (infinity) and for NaN
    return not matched or update % COMPARE_EVERY == 0 or run.sampler.vllm is not None


def record_sampler_gap(run: PPORun, rollout: Rollout, recomputed: bool) -> None:
    """Record the largest difference between the log-probabilities of decoding loop and training, in nats, if recomputed."""
    if recomputed:
        gap = (rollout.sampled_logprobs - rollout.old_logprobs).abs()
        run.progress.sampler_gap = float(gap.masked_fill(~rollout.mask, 0.0).max())


def compute_rewards(run: PPORun, rollout: Rollout, scores: Tensor) -> Tensor:
    """Rewards [B, T] from normalized and clipped scores [B]: the KL penalty on every token, and the score.

    A score includes the row's `token_scores` (0 if the reward does not score tokens), which are rewards of their tokens. The
    last real token receives the rest, so that a row sums to its score minus the KL penalty. `whiten_rewards` then divides
    all rewards by their standard deviation.
    """
    kl = k1(rollout.old_logprobs, rollout.ref_logprobs)  # log pi - log ref, [B, T] nats
    kl_coef = 0.0 if run.recipe.use_kl_loss else run.progress.kl_coef
    last_token_scores = scores - rollout.token_scores.sum(dim=1)  # [B]
    rewards = token_rewards(last_token_scores, kl, rollout.mask, kl_coef) + rollout.token_scores
    if run.recipe.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
    return rewards


def estimate_advantages(run: PPORun, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T], 0 outside the mask, from rewards [B, T].

    `advantage_estimator` names a function in `align.maths.advantages`. With a value model (GAE), advantages are whitened over
    all tokens of the rollout. Other estimators scale advantages themselves and have no returns, which are 0.
    """
    recipe, mask = run.recipe, rollout.mask
    estimate = getattr(advantage_functions, recipe.advantage_estimator)
    if recipe.estimator.value_model:
        advantages, returns = estimate(rewards, rollout.values, mask, recipe.gamma, recipe.lam)
        return masked_whiten(advantages, mask), returns
    advantages = estimate(rewards, mask, recipe.num_generations, recipe.gamma)  # rows are grouped by prompt
    return advantages, torch.zeros_like(advantages)


def importance_weights(run: PPORun, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
    """Weights [B, T] of tokens that another engine sampled, and metrics of them; all 1 with the mode `none`.

    The loss of a token is homogeneous in its advantage, so a weight on the advantage is one on the loss. Where the two engines
    differ by rounding alone, weights are 1, too: the rounding of the other one depends on how it batches at the moment, and a
    resumed run would end with other weights than one that was not interrupted.

    Raises:
        UserError: the sampler has other weights than the policy, and not those of the update before.
    """
    recipe, mask = run.recipe, rollout.mask
    gap = rollout.old_logprobs - rollout.sampled_logprobs
    mean = float(masked_mean(gap.abs(), mask))
    if not recipe.one_step_off_policy:
        check_sampler_gap(mean, limits_of(recipe.bf16, run.world.tf32))
    metrics = {"policy/sampler_gap_mean": mean}
    rounding = run.progress.sampler_gap <= ENGINE_TOLERANCE
    if recipe.vllm_importance_sampling_mode == "none" or rounding:
        return torch.ones_like(gap), metrics
    found = importance(gap, mask, recipe.vllm_importance_sampling_mode, recipe.vllm_importance_sampling_cap)
    metrics |= {"policy/importance_cut": found.cut, "policy/importance_ess": found.effective}
    return found.weights, metrics


def update_ema(run: PPORun) -> None:
    """Update the exponential moving average of the policy, if there is one."""
    if run.ema is not None:
        run.ema.update()


def adapt_kl_coef(run: PPORun, rollout: Rollout) -> None:
    """Set the KL coefficient of the next update from the KL of this update's rollout, if the recipe has a `kl_target`.

    `step` calls it only if the policy trains: before, the KL is 0 and would lower the coefficient.
    """
    recipe, progress = run.recipe, run.progress
    if recipe.kl_target is not None:
        kl = float(response_kl(rollout, recipe.one_step_off_policy).mean())  # nats per response
        progress.kl_coef = adapted_kl_coef(progress.kl_coef, kl, recipe.kl_target, len(rollout), recipe.kl_horizon)
