"""Checks of a model that has just been loaded: whether its files held its weights, no others, and finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from align.compat.deepspeed import local_elements
from align.compat.transformers import loads_sharded
from align.errors import UserError

POOLER = "pooler"  # layer of encoders between backbone and head, which only some checkpoints have
# Buffers of earlier versions of transformers, which hold nothing that was trained.
OLD_BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", "position_ids", "token_type_ids")


def check_report(model: PreTrainedModel, report: Mapping[str, Any], path: str, new_head: bool) -> list[str]:
    """Check that files held the weights of the model's configuration; transformers draws others with a warning alone.

    Args:
        report: `output_loading_info` of `from_pretrained`.
        new_head: whether the model may get a new head.

    Returns:
        names of weights in the files that the model has no place for, such as those of another head.

    Raises:
        UserError: the files lack one, hold one that the backbone has no place for, or of another shape.
    """
    backbone = model.base_model
    prefix = f"{model.base_model_prefix}." if backbone is not model else ""
    again = "copy or download the model again, or name another one."
    what = f"the weights of this {type(model).__name__}"

    def counts(name: str) -> bool:
        return not new_head or (name.startswith(prefix) and POOLER not in name)

    if bad := sorted(filter(counts, report["missing_keys"])):
        raise UserError(f"{path}: {what} lack {_first(bad)}; {again}")
    if shapes := sorted(
        (name, tuple(has), tuple(wants)) for name, has, wants in report["mismatched_keys"] if counts(name)
    ):
        _, has, wants = shapes[0]
        raise UserError(
            f"{path}: {what} hold {_first([each for each, *_ in shapes])} of shape {has}, where its config.json asks for "
            f"{wants}; {again}"
        )
    places = {name for name, _ in (backbone if new_head else model).named_children()} | {
        name for name, _ in backbone.named_children()
    }
    config = model.config.get_text_config()
    layers = config.num_hidden_layers if hasattr(config, "num_hidden_layers") else 0
    extra = range(
        layers, layers + (getattr(config, "num_nextn_predict_layers", None) or 0)
    )  # of multi-token prediction

    def has_place(name: str) -> bool:
        parts = name.removeprefix(f"{model.base_model_prefix}.").split(".")
        is_extra = any(part.isdigit() and int(part) in extra for part in parts)
        return parts[0] in places and not is_extra and not name.endswith(OLD_BUFFERS)

    if bad := sorted(filter(has_place, report["unexpected_keys"])):
        raise UserError(
            f"{path}: {what} hold {_first(bad)}, which its config.json has no place for; correct config.json, or {again}"
        )
    return sorted(name for name in report["unexpected_keys"] if not name.endswith(OLD_BUFFERS))


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


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
        raise UserError(
            f"{path}: the weights hold NaN or infinity, in {_first(bad)}; train or download the model again."
        )
