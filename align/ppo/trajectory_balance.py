"""The objective `trajectory_balance`: optimizer steps on the newest rollout and earlier ones, without importance weights.

Its gradient is that of REINFORCE on the KL-regularized objective, with the mean over the prompt's other responses as baseline
and log-probabilities of the current policy (`align/maths/trajectory_balance.py`). Each step therefore makes two passes over
its responses: a forward pass for their residuals, then forward and backward. A single pass would require that all responses
to a prompt share a microbatch.

Where a prompt has one response, the baseline is a value model's estimate for the prompt, trained on the same residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import torch
from torch import Tensor

from align.data.collate import chunks
from align.maths.losses import loss_weights
from align.maths.trajectory_balance import leave_one_out_excess
from align.models.forward import response_logprobs
from align.ppo.ppo_run import PPORun
from align.ppo.replay import Replay
from align.ppo.rollout import Rollout
from align.ppo.scores import current_scores
from align.ppo.update import Experience, prompt_values, rows_by_rank, take_steps


def balance_steps(run: PPORun, replay: Replay, rollout: Rollout, update: int) -> dict[str, float]:
    """Add `rollout` to the replay buffer and take `gradient_steps` optimizer steps on it; returns metrics as `take_steps`."""
    replay.add(rollout)
    return take_steps(run, replay_minibatches(run, replay, update), update)


def replay_minibatches(run: PPORun, replay: Replay, update: int) -> Iterator[Experience]:
    """Minibatches from the replay buffer; advantages are computed when the next is requested, with the current models.

    All scores are normalized by the current moments, so that old and new responses have the same optimum. With a value model,
    `returns[:, 0]` is its target for the prompt.
    """
    recipe = run.recipe
    assert replay.rows is not None
    for index in replay.draw(recipe.seed, update, recipe.gradient_steps, recipe.minibatch_size, recipe.num_generations):
        rows = replay.rows.rows(index)
        scores, kl, kl_coef = current_scores(run, rows), current_kl(run, rows), run.progress.kl_coef
        returns = torch.zeros_like(rows.values)
        if run.models.value is None:
            excess = leave_one_out_excess(scores, kl, kl_coef, recipe.num_generations)
        else:
            returns[:, 0] = scores - kl_coef * kl
            excess = returns[:, 0] - current_values(run, rows)
        yield Experience(
            **{part.name: getattr(rows, part.name) for part in fields(rows)},
            advantages=excess[:, None] * rows.mask,
            returns=returns,
            weights=loss_weights(rows.mask, recipe.estimator.aggregation, recipe.response_length),
        )


def current_kl(run: PPORun, rows: Rollout) -> Tensor:
    """log pi - log ref of each response under the current policy, [B] float32 nats."""

    def measure(batch: Rollout) -> Tensor:
        length = batch.mask.shape[1]
        logprobs = response_logprobs(run.models.policy, *batch.sequences(), length, run.recipe.temperature)
        return logprobs.sum(dim=1) - batch.ref_logprobs.masked_fill(~batch.mask, 0.0).sum(dim=1)  # 0 at padding

    return measure_rows(run, rows, "update_policy", measure)


def current_values(run: PPORun, rows: Rollout) -> Tensor:
    """The current value of each response's prompt, [B] float32."""
    return measure_rows(run, rows, "update_value", lambda batch: prompt_values(run, batch))


@torch.no_grad()
def measure_rows(run: PPORun, rows: Rollout, phase: str, measure: Callable[[Rollout], Tensor]) -> Tensor:
    """A number for each row, [B] float32, identical on every rank; each rank computes a share."""
    world = run.world
    by_rank = rows_by_rank(rows, world)
    mine = by_rank[world.rank]
    with world.clock.phase(phase):
        parts = [measure(rows.rows(mine[part])) for part in chunks(len(mine), run.sampler.batch_size)]
    found = torch.empty(len(rows), device=world.device)
    found[torch.cat(by_rank)] = world.gather(torch.cat(parts))
    return found
