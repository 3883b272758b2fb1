"""The objective `trajectory_balance`: optimizer steps on the newest rollout and earlier ones, without a correction.

Its gradient is REINFORCE's of the KL-regularized objective with the mean of the prompt's other responses as baseline, where
log-probabilities are those of the policy at each step (`align/maths/trajectory_balance.py`). So each step has two passes over
its responses: one forward, which tells how far each is from the balance, and one forward and backward. Were there one, the
responses to a prompt would have to share a microbatch.
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
from align.ppo.scores import shaped_scores
from align.ppo.update import Experience, shares, take_steps


def balance(run: PPORun, replay: Replay, rollout: Rollout, update: int) -> dict[str, float]:
    """`gradient_steps` optimizer steps on kept responses, those of `rollout` included. Returns metrics as `take_steps`."""
    replay.add(rollout)
    return take_steps(run, replayed(run, replay, update), update)


def replayed(run: PPORun, replay: Replay, update: int) -> Iterator[Experience]:
    """Minibatches of kept responses, each with the policy's log-probabilities at the time when it is asked for.

    All scores of a minibatch are normalized by the moments of now, so that they have one optimum.
    """
    recipe = run.recipe
    assert replay.rows is not None
    for index in replay.draw(recipe.seed, update, recipe.gradient_steps, recipe.minibatch_size, recipe.num_generations):
        rows = replay.rows.rows(index)
        kl = kl_now(run, rows)
        excess = leave_one_out_excess(shaped_scores(run, rows), kl, run.progress.kl_coef, recipe.num_generations)
        yield Experience(
            **{part.name: getattr(rows, part.name) for part in fields(rows)},
            advantages=excess[:, None] * rows.mask,
            returns=torch.zeros_like(rows.values),
            weights=loss_weights(rows.mask, recipe.estimator.aggregation, recipe.response_length),
        )


@torch.no_grad()
def kl_now(run: PPORun, rows: Rollout) -> Tensor:
    """log pi - log ref of each response under the policy as it is, [B] float32 nats; each rank computes its share."""
    world, parts = run.world, []
    by_rank = shares(rows, world)
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
