"""Gradients summed where they are kept.

The embedding and the head have a row per token of the vocabulary, often half of all weights. autograd makes a whole gradient
of each in every pass, mostly zeros for the embedding, to add it to the last; here the parts that are not zero are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE = 2**18  # numbers that are added at once


def accumulate_in_place(
    embedding: nn.Module, head: nn.Module | None, master: Callable[[nn.Parameter], nn.Parameter]
) -> None:
    """Have the gradients of these two layers' weights summed in place, where they train and the layers are plain ones.

    Args:
        master: given a weight, the one that gets its gradients.
    """
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad and _is_plain(embedding):
        _set_total(embedding.weight, master)
        apply: Any = _Embed.apply
        embedding.forward = lambda ids: apply(ids, embedding.weight, embedding.padding_idx)  # type: ignore[method-assign, assignment]
    if type(head) is nn.Linear and head.weight.requires_grad:
        _set_total(head.weight, master)


def _set_total(weight: Any, master: Callable[[nn.Parameter], nn.Parameter]) -> None:
    weight.total = master(weight)


def _is_plain(embedding: nn.Embedding) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def accumulator_of(weight: Tensor) -> nn.Parameter | None:
    """The weight in whose `grad` the gradients of this one are to be summed; None where autograd does it."""
    total: nn.Parameter | None = getattr(weight, "total", None)
    return total


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.ids, ctx.total, ctx.padding = ids, accumulator_of(weight), padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        total = ctx.total
        if total.grad is None:
            total.grad = torch.zeros_like(total)
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ctx.ids == ctx.padding)[..., None], 0.0)
        total.grad.index_add_(0, ctx.ids.flatten(), gradient.flatten(0, -2).to(total.dtype))
        return None, None, None


def accumulate_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place; a sum of more than one product is float32."""
    if total is None:
        return left @ right
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    total = total.float()
    add_in_pieces(total, left @ right)
    return total


def add_in_pieces(total: Tensor, part: Tensor) -> None:
    """Add a bfloat16 tensor to a float32 one of its shape, in place.

    In pieces: torch makes a float32 copy of what it adds, which is to stay in the processor's cache.
    """
    if part.numel() <= PIECE:
        total += part
        return
    rows = max(1, PIECE // part[0].numel())
    for into, piece in zip(torch.split(total, rows), torch.split(part, rows), strict=True):
        into += piece
