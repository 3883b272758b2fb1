"""The objectives `trajectory_balance` and `path_consistency`: optimizer steps on the newest rollout and earlier ones, without importance weights.

Its gradient is that of REINFORCE on the KL-regularized objective, with the mean over the prompt's other responses as baseline
and log-probabilities of the current policy (`align/maths/trajectory_balance.py`). Each step therefore makes two passes over
its responses: a forward pass for their residuals, then forward and backward. A single pass would require that all responses
to a prompt share a microbatch.

Where a prompt has one response, the baseline is a value model's estimate for the prompt, trained on the same residuals.
`path_consistency` has such an estimate, and a residual, for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional as F

from align.maths.advantages import gae, token_rewards
from align.maths.kl import k1
from align.maths.losses import loss_weights
from align.maths.trajectory_balance import leave_one_out_excess, path_advantages
from align.models.forward import response_logprobs, to_device
from align.ppo.ppo_run import PPORun
from align.ppo.replay import Replay
from align.ppo.rollout import Rollout
from align.ppo.scores import current_scores
from align.ppo.update import Experience, prompt_values, take_steps, token_values


def balance_steps(run: PPORun, replay: Replay, rollout: Rollout, update: int) -> dict[str, float]:
    """Add `rollout` to the replay buffer and take `gradient_steps` optimizer steps on it; returns metrics as `take_steps`."""
    replay.add(rollout)
    return take_steps(run, replay_minibatches(run, replay, update), update)


def replay_minibatches(run: PPORun, replay: Replay, update: int) -> Iterator[Experience]:
    """Minibatches from the replay buffer; advantages are computed when the next is requested, with the current models.

    All scores are normalized by the current moments, so that old and new responses have the same optimum. With a value model,
    `returns` are its targets and `values` are those of the current one: of the prompt, in the first column, or of every token.
    """
    recipe = run.recipe
    assert replay.rows is not None
    for index in replay.draw(recipe.seed, update, recipe.gradient_steps, recipe.minibatch_size, recipe.num_generations):
        rows = replay.rows.rows(index)
        scores, kl_coef = current_scores(run, rows), run.progress.kl_coef
        values, returns = torch.zeros_like(rows.values), torch.zeros_like(rows.values)
        if recipe.objective == "path_consistency":
            values = current_values(run, rows)
            rewards = token_rewards(scores - rows.token_scores.sum(dim=1), current_kl(run, rows), rows.mask, kl_coef)
            residuals, returns = gae(rewards + rows.token_scores, values, rows.mask, 1.0, 1.0)  # sums to the end
            advantages = path_advantages(residuals, rows.mask)
        else:
            kl = current_response_kl(run, rows)
            if run.models.value is None:
                excess = leave_one_out_excess(scores, kl, kl_coef, recipe.num_generations)
            else:
                values[:, 0], returns[:, 0] = current_prompt_values(run, rows), scores - kl_coef * kl
                excess = returns[:, 0] - values[:, 0]
            advantages = excess[:, None] * rows.mask
        measured = {part.name: getattr(rows, part.name) for part in fields(rows)}
        yield Experience(
            **measured | {"values": values},
            advantages=advantages,
            returns=returns,
            weights=loss_weights(rows.mask, recipe.estimator.aggregation, recipe.response_length),
        )


def current_response_kl(run: PPORun, rows: Rollout) -> Tensor:
    """log pi - log ref of each response under the current policy, [B] float32 nats."""

    def measure(batch: Rollout) -> Tensor:
        return policy_logprobs(run, batch).sum(dim=1) - batch.ref_logprobs.masked_fill(~batch.mask, 0.0).sum(dim=1)

    return measure_rows(run, rows, "update_policy", measure)


def current_kl(run: PPORun, rows: Rollout) -> Tensor:
    """log pi - log ref of each token under the current policy, [B, T] float32 nats."""
    width = rows.mask.shape[1]
    logprobs = measure_rows(run, rows, "update_policy", lambda batch: widen(policy_logprobs(run, batch), width))
    return k1(logprobs, rows.ref_logprobs)


def current_prompt_values(run: PPORun, rows: Rollout) -> Tensor:
    """The current value of each response's prompt, [B] float32."""
    return measure_rows(run, rows, "update_value", lambda batch: prompt_values(run, batch))


def current_values(run: PPORun, rows: Rollout) -> Tensor:
    """The current value of the state before each token, [B, T] float32; 0 at padding."""
    width = rows.mask.shape[1]
    return measure_rows(run, rows, "update_value", lambda batch: widen(token_values(run, batch), width))


def policy_logprobs(run: PPORun, batch: Rollout) -> Tensor:
    """Log-probabilities under the current policy, [m, T] float32 nats; 0 at padding."""
    return response_logprobs(run.models.policy, *batch.sequences(), batch.mask.shape[1], run.recipe.temperature)


def widen(numbers: Tensor, width: int) -> Tensor:
    """[m, T] -> [m, `width`], 0 at the new columns."""
    return F.pad(numbers, (0, width - numbers.shape[1]))


@torch.no_grad()
def measure_rows(run: PPORun, rows: Rollout, phase: str, measure: Callable[[Rollout], Tensor]) -> Tensor:
    """Numbers for each row, [B, ...] float32, identical on every rank; each rank computes a share."""
    world = run.world
    passes = run.plan.passes(rows.sizes.tolist(), run.recipe.per_device_eval_batch_size)
    with world.clock.phase(phase):
        parts = [measure(rows.rows(to_device(torch.tensor(part), world.device))) for part in passes[world.rank]]
    gathered = world.gather(torch.cat(parts))
    found = torch.empty_like(gathered)
    found[to_device(torch.tensor([row for each in passes for part in each for row in part]), world.device)] = gathered
    return found
