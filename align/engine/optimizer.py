"""Optimizers, the parameters they train, and learning-rate schedules."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.adagrad import adagrad
from transformers import Adafactor, get_scheduler

from align.compat.deepspeed import full_shape
from align.config.base import StageRecipe
from align.config.optimizer import DEFAULT, EIGHT_BIT


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that have a gradient, with their names."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


class Adagrad(torch.optim.Optimizer):
    """torch's Adagrad, whose state of a weight begins with its first step.

    That of torch's class begins with the optimizer, for weights that ZeRO then replaces; DeepSpeed makes another one in its
    place, which has neither the recipe's weight decay nor its schedule.
    """

    def __init__(self, params: Any, lr: float, lr_decay: float = 0.0, weight_decay: float = 0.0, eps: float = 1e-10):
        super().__init__(params, {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(weight)}
            adagrad(
                weights,
                [weight.grad for weight in weights],
                [self.state[weight]["sum"] for weight in weights],
                [self.state[weight]["step"] for weight in weights],
                **{name: group[name] for name in ("lr", "lr_decay", "weight_decay", "eps")},
                maximize=False,
            )


def optimizer_class(
    name: str, betas: tuple[float, float], eps: float, arguments: Mapping[str, Any]
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class of an optimizer, and its arguments beside the learning rate and weight decay; as transformers makes it.

    Args:
        name: a key of `align.config.optimizer.OPTIMIZERS`.
        betas, eps: of Adam; others do not read them.
        arguments: `optim_args`.
    """
    if name == "adafactor":  # steps of the given learning rate, as for any other optimizer
        return Adafactor, {"scale_parameter": False, "relative_step": False}
    if name in ("sgd", "adagrad", "rmsprop"):
        classes = {"sgd": torch.optim.SGD, "adagrad": Adagrad, "rmsprop": torch.optim.RMSprop}
        return classes[name], dict(arguments)
    adam = {"betas": betas, "eps": eps}
    if name in EIGHT_BIT:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
        return bitsandbytes.optim.AdamW, {**adam, "optim_bits": 8, "is_paged": False}
    # fused: one pass over memory instead of one per operation
    return torch.optim.AdamW, {**adam, "fused": True} if name == DEFAULT else adam


def make_optimizer(trained: Sequence[nn.Parameter], recipe: StageRecipe, learning_rate: float) -> torch.optim.Optimizer:
    """The recipe's optimizer over these parameters; biases and norms (all one-dimensional parameters) are not decayed."""
    decayed = [parameter for parameter in trained if len(full_shape(parameter)) > 1]
    others = [parameter for parameter in trained if len(full_shape(parameter)) <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    cls, arguments = optimizer_class(recipe.optim, betas, recipe.adam_epsilon, recipe.optim_args)
    make: Any = cls  # classes differ in their arguments
    optimizer: torch.optim.Optimizer = make(
        [group for group in groups if group["params"]], lr=learning_rate, **arguments
    )
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate for all parameters from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def learning_rates(
    peak: float, scheduler: str, warmup_steps: float, updates: int, arguments: Mapping[str, Any] | None = None
) -> list[float]:
    """The learning rate of each update.

    Args:
        scheduler: a name of transformers', such as "linear".
        warmup_steps: in updates; below 1 it is a share of all updates.
        arguments: of the schedule, `lr_scheduler_kwargs`.
    """
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    warmup = warmup_steps if warmup_steps >= 1 else warmup_steps * updates
    schedule = get_scheduler(scheduler, probe, math.ceil(warmup), updates, dict(arguments or {}))
    rates = []
    for _ in range(updates):
        rates.append(probe.param_groups[0]["lr"])
        probe.step()
        schedule.step()
    return rates
