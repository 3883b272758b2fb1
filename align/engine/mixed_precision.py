"""bfloat16 mixed precision: bfloat16 weights compute, the optimizer steps float32 masters.

Gradients are accumulated over microbatches in float32, too: in bfloat16 a sum of equal terms stops growing at 256 of
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.compat.others import in_place_changes
from align.compat.transformers import attention_implementation, register_sdpa_variant, sdpa_attention
from align.models.in_place_gradients import add_in_pieces
from reward_models.heads import hf_model

FLOAT32_ATTENTION = "sdpa_in_float32"


def convert_to_bfloat16(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Convert all weights to bfloat16, in place.

    Returns:
        for each trained weight its float32 master, to be given to the optimizer. Gradients of the weight are
        accumulated in the master; after each step the caller copies masters back by `copy_masters`.
    """
    masters = {}
    for weight in model.parameters():
        if weight.requires_grad:
            masters[weight] = nn.Parameter(weight.detach().float().clone())
            weight.register_post_accumulate_grad_hook(partial(_accumulate_in_master, masters[weight]))  # type: ignore[no-untyped-call]
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.bfloat16)
    return masters


def _accumulate_in_master(master: nn.Parameter, weight: Tensor) -> None:
    if weight.grad is None:  # accumulated in place already
        return
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        add_in_pieces(master.grad, weight.grad)
    weight.grad = None


def accumulate_in_float32(model: nn.Module) -> None:
    """Accumulate the gradients of bfloat16 weights over microbatches in float32, for what reads them from `grad` at the step.

    `grad` always holds the sum, rounded. A sum begins anew once `grad` is None, another tensor, or has been changed.
    """
    new: dict[Tensor, Tensor] = {}  # of the backward pass that is going on
    sums: dict[Tensor, tuple[Tensor, Tensor, int]] = {}  # weight -> the sum, the rounded one in `grad`, and its version

    def before(weight: Tensor, gradient: Tensor) -> None:
        if weight.dtype == torch.bfloat16:
            new[weight] = gradient
            _, rounded, version = sums.get(weight, (None, None, 0))
            if rounded is not None and (weight.grad is not rounded or in_place_changes(rounded) != version):
                del sums[weight]

    def after(weight: Tensor) -> None:
        if (gradient := new.pop(weight, None)) is None:
            return
        total = sums[weight][0].add_(gradient) if weight in sums else gradient.float()
        weight.grad = total.to(weight.dtype)
        sums[weight] = total, weight.grad, in_place_changes(weight.grad)

    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_hook(partial(before, weight))  # type: ignore[no-untyped-call]
            weight.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]


@torch.no_grad()
def copy_masters(masters: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each master into its weight, rounding it; pairs are (weight, master)."""
    for weight, master in masters:
        weight.copy_(master)


def use_float32_attention(model: nn.Module) -> None:
    """Compute a bfloat16 model's attention in float32, for CPUs.

    There torch's bfloat16 attention kernel takes three to ten times as long to train as the float32 one.
    """
    inner: PreTrainedModel = hf_model(model)
    if attention_implementation(inner.config) == "sdpa":
        inner.set_attn_implementation(FLOAT32_ATTENTION)


def _sdpa_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if query.shape[2] == 1:  # a decoding step: no gradient, and converting the whole cache would cost more
        return sdpa_attention(module, query, key, value, mask, **kwargs)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    output, _ = sdpa_attention(module, query.float(), key.float(), value.float(), mask, **kwargs)
    return output.to(query.dtype), None


register_sdpa_variant(FLOAT32_ATTENTION, _sdpa_in_float32)
