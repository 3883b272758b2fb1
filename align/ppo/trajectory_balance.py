"""The objective `trajectory_balance`: optimizer steps on the newest rollout and earlier ones, without importance weights.

Its gradient is that of REINFORCE on the KL-regularized objective, with the mean over the prompt's other responses as baseline
and log-probabilities of the current policy (`align/maths/trajectory_balance.py`). Each step therefore makes two passes over
its responses: a forward pass for their residuals, then forward and backward. A single pass would require that all responses
to a prompt share a microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from align.ppo.update import Experience, rows_by_rank, take_steps


def balance_steps(run: PPORun, replay: Replay, rollout: Rollout, update: int) -> dict[str, float]:
    """Add `rollout` to the replay buffer and take `gradient_steps` optimizer steps on it; returns metrics as `take_steps`."""
    replay.add(rollout)
    return take_steps(run, replay_minibatches(run, replay, update), update)


def replay_minibatches(run: PPORun, replay: Replay, update: int) -> Iterator[Experience]:
    """Minibatches from the replay buffer; advantages are computed when the next is requested, with the current policy.

    All scores are normalized by the current moments, so that old and new responses have the same optimum.
    """
    recipe = run.recipe
    assert replay.rows is not None
    for index in replay.draw(recipe.seed, update, recipe.gradient_steps, recipe.minibatch_size, recipe.num_generations):
        rows = replay.rows.rows(index)
        kl = current_kl(run, rows)
        excess = leave_one_out_excess(current_scores(run, rows), kl, run.progress.kl_coef, recipe.num_generations)
        yield Experience(
            **{part.name: getattr(rows, part.name) for part in fields(rows)},
            advantages=excess[:, None] * rows.mask,
            returns=torch.zeros_like(rows.values),
            weights=loss_weights(rows.mask, recipe.estimator.aggregation, recipe.response_length),
        )


@torch.no_grad()
def current_kl(run: PPORun, rows: Rollout) -> Tensor:
    """log pi - log ref of each response under the current policy, [B] float32 nats; each rank computes a share."""
    world, parts = run.world, []
    by_rank = rows_by_rank(rows, world)
    mine = by_rank[world.rank]
    with world.clock.phase("update_policy"):
        for part in chunks(len(mine), run.sampler.batch_size):
            batch = rows.rows(mine[part])
            ids, real = batch.sequences()
            length = batch.mask.shape[1]
            logprobs = response_logprobs(run.models.policy, ids, real, length, run.recipe.temperature)  # 0 at padding
            parts.append(logprobs.sum(dim=1) - batch.ref_logprobs.masked_fill(~batch.mask, 0.0).sum(dim=1))
    kl = torch.empty(len(rows), device=world.device)
    kl[torch.cat(by_rank)] = world.gather(torch.cat(parts))
    return kl
