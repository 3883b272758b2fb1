"""AdamW, the parameters it trains, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import get_scheduler

from align.compat.deepspeed import full_shape


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that have a gradient, with their names."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def adamw(
    trained: Sequence[nn.Parameter],
    learning_rate: float,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW over these parameters; biases and norms (all one-dimensional parameters) are not decayed."""
    decayed = [parameter for parameter in trained if len(full_shape(parameter)) > 1]
    others = [parameter for parameter in trained if len(full_shape(parameter)) <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=betas,
        eps=eps,
        fused=True,  # one pass over memory instead of one per operation
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate for all parameters from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def learning_rates(peak: float, scheduler: str, warmup_steps: float, updates: int) -> list[float]:
    """The learning rate of each update.

    Args:
        scheduler: a name of transformers', such as "linear".
        warmup_steps: in updates; below 1 it is a share of all updates.
    """
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = warmup_steps if warmup_steps >= 1 else warmup_steps * updates
    schedule = get_scheduler(scheduler, probe, math.ceil(warmup), updates)
    rates = []
    for _ in range(updates):
        rates.append(peak * probe.param_groups[0]["lr"])
        probe.step()
        schedule.step()
    return rates
