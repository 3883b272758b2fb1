"""A PPO run as its stage sets it up, and what its first step computes, for tests of single rooms of the step."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from align.config.ppo import PPORecipe
from align.engine.batch_plan import batch_plan
from align.engine.distributed import World
from align.ppo import step as step_module
from align.ppo.data import load_data
from align.ppo.inputs import check_ppo_inputs
from align.ppo.ppo_run import PPORun, Progress
from align.ppo.rollout import Rollout
from align.ppo.setup import set_up
from align.ppo.step import compute_rewards, estimate_advantages, step

ALONE = World(0, 1, torch.device("cpu"))


def ppo_run(recipe: PPORecipe, world: World = ALONE) -> PPORun:
    """The run before its first update."""
    inputs = check_ppo_inputs(recipe)
    data = load_data(recipe, inputs, world)
    return set_up(recipe, inputs, data, batch_plan(recipe, world.size), world, None)


def rollout_of(run: PPORun, update: int = 0) -> Rollout:
    """The rollout that `step` hands to the optimization, which is left out."""
    seen: list[Rollout] = []
    with mock.patch.object(step_module, "optimize", lambda run, rollout, *_: seen.append(rollout) or {}):
        step(run, update)
    return seen[0]


def advantages_of(run: PPORun, rollout: Rollout, scores: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a rollout whose scores have been shaped."""
    run = replace(run, progress=Progress(kl_coef))
    return estimate_advantages(run, rollout, compute_rewards(run, rollout, scores))
