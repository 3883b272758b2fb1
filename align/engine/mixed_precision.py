"""bfloat16 on one process, as DeepSpeed has it on many: the model computes with bfloat16 weights, float32 ones are trained.

Gradients are summed over microbatches in float32, too: in bfloat16 a sum stops growing at 256 equal parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.models.in_place_gradients import add_in_pieces
from reward_models.heads import hf_model

FLOAT32_ATTENTION = "sdpa_in_float32"


def convert_to_bfloat16(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Store all weights in bfloat16.

    Returns:
        for each weight that trains the float32 one that an optimiser is to step, which gets its gradients; after a step
        it is for the caller to copy it.
    """
    masters = {}
    for weight in model.parameters():
        if weight.requires_grad:
            masters[weight] = nn.Parameter(weight.detach().float().clone())
            weight.register_post_accumulate_grad_hook(partial(_collect, masters[weight]))  # type: ignore[no-untyped-call]
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.bfloat16)
    return masters


def _collect(master: nn.Parameter, weight: Tensor) -> None:
    if weight.grad is None:  # summed in place
        return
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        add_in_pieces(master.grad, weight.grad)
    weight.grad = None


@torch.no_grad()
def copy_masters(masters: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy float32 weights into those that the model computes with: pairs (weight, master)."""
    for weight, master in masters:
        weight.copy_(master)


def use_float32_attention(model: nn.Module) -> None:
    """Have a bfloat16 model on a CPU attend in float32.

    torch's bfloat16 kernel for it takes three to ten times as long to train there as the float32 one.
    """
    inner: PreTrainedModel = hf_model(model)
    if inner.config._attn_implementation == "sdpa":
        inner.set_attn_implementation(FLOAT32_ATTENTION)


def _sdpa_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if query.shape[2] == 1:  # a step of generation, where the keys and values are many, and no gradient is wanted
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    output: Tensor = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)[0]
    return output.to(query.dtype), None


AttentionInterface.register(FLOAT32_ATTENTION, _sdpa_in_float32)


AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)
