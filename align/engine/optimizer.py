"""AdamW over a model's parameters, and PPO's learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import get_scheduler

from align.config.base import StageRecipe
from align.config.ppo import PPORecipe


def optimizer_for(trainable: Sequence[nn.Parameter], recipe: StageRecipe, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over these parameters; biases and norms (all one-dimensional parameters) are not decayed."""
    # Under ZeRO-3 a parameter is an empty shard; `ds_shape` remembers what it was.
    decayed = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    kept = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,  # one pass over memory instead of one per operation
    )


def learning_rates(recipe: PPORecipe, updates: int) -> list[tuple[float, float]]:
    """Learning rates of policy and value for each update: the schedule moves once per update, not per optimiser step."""
    clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = recipe.warmup_steps if recipe.warmup_steps >= 1 else recipe.warmup_steps * updates
    schedule = get_scheduler(recipe.lr_scheduler_type, clock, math.ceil(warmup), updates)
    rates = []
    for _ in range(updates):
        factor = clock.param_groups[0]["lr"]
        rates.append((recipe.learning_rate * factor, (recipe.value_learning_rate or recipe.learning_rate) * factor))
        clock.step()
        schedule.step()
    return rates
