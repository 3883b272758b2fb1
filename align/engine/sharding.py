"""Weights under ZeRO-3: sharded as they are loaded, gathered inside a block, gathered on the CPU to be saved."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.compat.deepspeed import is_sharded
from align.compat.transformers import loads_sharded
from align.config.base import StageRecipe
from align.engine.cpu import without_keeping
from align.engine.deepspeed_config import deepspeed_config, deepspeed_file, zero_stage
from align.engine.distributed import World
from align.models.save import save_weights


def load_device(world: World) -> torch.device | None:
    """Where loaded weights go, straight from the mapped file, so that no process holds a copy on the host.

    None leaves them there: on a CPU, and under ZeRO-3, which shards them instead.
    """
    return None if world.device.type == "cpu" or loads_sharded() else world.device


@contextlib.contextmanager
def sharded_load(recipe: StageRecipe, role: str = "policy") -> Iterator[None]:
    """Under ZeRO-3, `from_pretrained` in this block shards each weight as it is read: no rank holds all of a model.

    Rank 0 maps the file, and hands out the parts.
    """
    if zero_stage(recipe, role) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(
        deepspeed_config(
            deepspeed_file(recipe, role),
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            accumulation=1,
            max_grad_norm=recipe.max_grad_norm,
            bf16=recipe.bf16,
        )
    )
    try:
        with without_keeping():
            yield
    finally:
        del alive  # transformers shards whatever is loaded for as long as this object lives


@contextlib.contextmanager
def gathered_parameters(parameters: list[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Gather sharded parameters inside the block; with `modify`, rank 0's changes to them are kept."""
    if not any(map(is_sharded, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        yield


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Put a module into evaluation mode inside the block."""
    training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(training)


def gathered_state_dict(
    module: nn.Module, world: World, master: Callable[[Any], Any] = lambda p: p
) -> dict[str, Tensor]:
    """All weights and persistent buffers, unsharded, on the CPU of rank 0; an empty dict elsewhere. Every rank must call it.

    Args:
        master: given a weight, the one of higher precision that it is a copy of, or itself.
    """
    persistent = module.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]
    weights = {}
    for name, tensor in [*module.named_parameters(), *buffers]:  # one by one: no rank ever holds a second full model
        with gathered_parameters([tensor] if isinstance(tensor, nn.Parameter) else []):
            if world.is_main:
                weights[name] = master(tensor).detach().cpu().clone()
    return weights


def save_from_main(module: nn.Module, weights: dict[str, Tensor], folder: Path, world: World) -> None:
    """Write rank 0's weights as a Hugging Face folder, adapters merged. Every rank must call it."""
    if world.is_main:
        save_weights(module, weights, folder)
    world.barrier()
