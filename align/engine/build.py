"""Which engine a model gets in this world, and the reference that is the policy with its adapter off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from align.config.base import StageRecipe
from align.engine.deepspeed_engine import DeepSpeedEngine
from align.engine.distributed import World
from align.engine.torch_engine import Engine


class AdapterOff(Engine):
    """The frozen model that a LoRA policy started from: the policy with its adapter off. It takes no memory."""

    def __init__(self, policy: Engine):
        self.policy = policy
        self.module = policy.module
        self.world = policy.world

    def __call__(self, **inputs: Any) -> Any:
        with torch.no_grad(), self.module.disable_adapter():
            return self.policy(**inputs)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[nn.Module]:
        with self.policy.unsharded() as model, model.disable_adapter():  # type: ignore[operator]
            yield model


def train_engine(
    model: PreTrainedModel | PeftModel,
    recipe: StageRecipe,
    world: World,
    learning_rate: float,
    accumulation: int,
    role: str = "policy",
) -> Engine:
    """An engine that trains `model`, taking `accumulation` microbatches per step."""
    if dist.is_initialized():
        return DeepSpeedEngine(model, recipe, world, learning_rate, role, accumulation)
    return Engine(model, recipe, world, learning_rate)


def frozen_engine(model: PreTrainedModel, recipe: StageRecipe, world: World, role: str = "policy") -> Engine:
    """An engine that only runs `model` forward; under ZeRO-3 it is sharded all the same."""
    if dist.is_initialized():
        return DeepSpeedEngine(model, recipe, world, None, role)
    return Engine(model, recipe, world, None)
