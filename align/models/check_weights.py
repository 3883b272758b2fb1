"""Checks of a model that has just been loaded: whether its files held every weight, and finite numbers only."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from align.compat.deepspeed import local_elements
from align.compat.transformers import loads_sharded
from align.errors import UserError

POOLER = "pooler"  # layer of encoders between backbone and head, which only some checkpoints have


def check_complete(model: PreTrainedModel, missing: Collection[str], path: str, new_head: bool) -> None:
    """Check that no weight had to be drawn at random, as transformers does with a warning alone.

    Args:
        missing: names of weights that the files lack.
        new_head: whether the model may get a new head.

    Raises:
        UserError: the files lack others.
    """
    backbone = f"{model.base_model_prefix}."
    bad = sorted(name for name in missing if not new_head or (name.startswith(backbone) and POOLER not in name))
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{path}: the weights of this {type(model).__name__} lack {bad[0]}{more}; copy or download the model again, or "
            "name another one."
        )


def check_finite(model: nn.Module, path: str) -> None:
    """Check that no weight is NaN or infinite; under ZeRO-3 on every rank alike.

    Raises:
        UserError: one is; names its tensor.
    """
    named = [(name, local_elements(parameter)) for name, parameter in model.named_parameters()]
    floats = [(name, values) for name, values in named if values.is_floating_point() and values.numel()]
    # The extremes of a tensor with a NaN are NaN; unlike `isfinite`, they need no memory.
    extremes = [torch.stack(torch.aminmax(values)) for _, values in floats]
    bad = [name for (name, _), pair in zip(floats, extremes, strict=True) if not pair.isfinite().all()]
    if loads_sharded() and dist.is_initialized():
        found = torch.tensor([name in bad for name, _ in named], device=named[0][1].device, dtype=torch.float32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        bad = [name for (name, _), flag in zip(named, found.tolist(), strict=True) if flag]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{path}: the weights hold NaN or infinity, in {bad[0]}{more}; train or download the model again."
        )
