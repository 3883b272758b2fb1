"""TF32 in Python: matrix products of float32 numbers that are rounded to 10 bits after the first, as tensor cores read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
            "aten::_scaled_dot_product_flash_attention_for_cpu"}  # fmt: skip
DROPPED = 13  # of the 23 bits of a float32


class TF32(TorchDispatchMode):
    """Inside, inputs of matrix products are rounded.

    Args:
        exact_rows: products of as many rows at most are float32's, as those of a decoding step where a kernel without tensor
            cores is the faster one.
    """

    def __init__(self, exact_rows: int = 0):
        super().__init__()
        self.exact_rows = exact_rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in PRODUCTS:
            matrices = [each for each in args if isinstance(each, Tensor) and each.dim() > 1]
            if matrices[0].shape[-2] > self.exact_rows:
                args = tree_map_only(Tensor, rounded, args)
        return func(*args, **(kwargs or {}))


def rounded(tensor: Tensor) -> Tensor:
    """Float32 numbers to the nearest with 10 bits after the first; others as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    half = 1 << DROPPED - 1
    return ((tensor.contiguous().view(torch.int32) + half) & -(2 * half)).view(torch.float32)
