"""Weights under ZeRO-3: loaded in shards, and gathered inside a block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch import nn

from align.config.base import StageRecipe
from align.engine.deepspeed_config import deepspeed_config, zero_stage


@contextlib.contextmanager
def sharded_load(recipe: StageRecipe, role: str = "policy") -> Iterator[None]:
    """Under ZeRO-3, `from_pretrained` inside this block shards each weight as it is read, so no rank holds a whole model."""
    if zero_stage(recipe, role) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(deepspeed_config(recipe, role, int(os.environ.get("WORLD_SIZE", "1")), 1))
    try:
        yield
    finally:
        del alive  # transformers shards whatever is loaded for as long as this object lives


@contextlib.contextmanager
def gathered_parameters(parameters: list[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Make sharded parameters whole inside the block; with `modify`, rank 0's values are kept at its end."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        yield
