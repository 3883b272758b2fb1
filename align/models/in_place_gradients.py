"""Gradients of the embedding and the head, accumulated in place.

Both have a row per token of the vocabulary, often half of all weights. In every pass autograd allocates a full
gradient of each, mostly zeros for the embedding, to add it to the accumulated one; here only the non-zero parts are
added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE = 2**18  # elements added at once


def accumulate_in_place(
    embedding: nn.Module, head: nn.Module | None, master: Callable[[nn.Parameter], nn.Parameter]
) -> None:
    """Accumulate these layers' weight gradients in place, if they train and are a plain `nn.Embedding` and `nn.Linear`.

    Args:
        master: given a weight, the parameter whose `grad` accumulates its gradients.
    """
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad and _is_plain(embedding):
        _set_accumulator(embedding.weight, master)
        apply: Any = _Embed.apply
        embedding.forward = lambda ids: apply(ids, embedding.weight, embedding.padding_idx)  # type: ignore[method-assign, assignment]
    if type(head) is nn.Linear and head.weight.requires_grad:
        _set_accumulator(head.weight, master)


def _set_accumulator(weight: Any, master: Callable[[nn.Parameter], nn.Parameter]) -> None:
    weight.accumulator = master(weight)


def _is_plain(embedding: nn.Embedding) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def accumulator_of(weight: Tensor) -> nn.Parameter | None:
    """The parameter whose `grad` accumulates this weight's gradients in place; None where autograd accumulates."""
    accumulator: nn.Parameter | None = getattr(weight, "accumulator", None)
    return accumulator


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.ids, ctx.accumulator, ctx.padding = ids, accumulator_of(weight), padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        accumulator = ctx.accumulator
        if accumulator.grad is None:
            accumulator.grad = torch.zeros_like(accumulator)
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ctx.ids == ctx.padding)[..., None], 0.0)
        accumulator.grad.index_add_(0, ctx.ids.flatten(), gradient.flatten(0, -2).to(accumulator.dtype))
        return None, None, None


def accumulate_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place where dtypes agree; a sum of more than one product is float32."""
    if total is None:
        return left @ right
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    total = total.float()
    add_in_pieces(total, left @ right)
    return total


def add_in_pieces(total: Tensor, part: Tensor) -> None:
    """Add a bfloat16 tensor to a float32 one of the same shape, in place.

    On a CPU in pieces, because torch first converts what it adds to float32, and that copy should fit the cache. A GPU has no
    such copy, and each piece would be a kernel to start.
    """
    if part.numel() <= PIECE or part.device.type != "cpu":
        total += part
        return
    rows = max(1, PIECE // part[0].numel())
    for into, piece in zip(torch.split(total, rows), torch.split(part, rows), strict=True):
        into += piece
