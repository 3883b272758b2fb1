"""The engine of a model: plain torch on one process without a DeepSpeed file, DeepSpeed otherwise."""

from __future__ import annotations

import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel

from align.config.base import StageRecipe
from align.engine.deepspeed_engine import DeepSpeedEngine
from align.engine.distributed import World
from align.engine.engine import Engine, TrainEngine
from align.engine.torch_engine import TorchEngine


def train_engine(
    model: PreTrainedModel | PeftModel,
    recipe: StageRecipe,
    world: World,
    learning_rate: float,
    accumulation: int,
    role: str = "policy",
) -> TrainEngine:
    """An engine that trains `model`, taking `accumulation` microbatches per step.

    Args:
        recipe: gives precision, clipping, the optimizer and the DeepSpeed file of `role`.
        role: "policy" or "value".
    """
    if dist.is_initialized():
        return DeepSpeedEngine(model, recipe, world, learning_rate, role, accumulation)
    return TorchEngine(model, recipe, world, learning_rate)


def frozen_engine(
    model: PreTrainedModel | PeftModel, recipe: StageRecipe, world: World, role: str = "policy"
) -> Engine:
    """An engine that only runs `model` forward; under ZeRO-3 it is sharded all the same."""
    if dist.is_initialized():
        return DeepSpeedEngine(model, recipe, world, None, role)
    return TorchEngine(model, recipe, world, None)
