"""Lists of ids to padded tensors, and the slices of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B, Q] int64 padded on the left, and a mask [B, Q] bool, True at the rows' own ids."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows of ids or labels -> [B, S] int64 padded on the right, and a mask [B, S] bool, True at the rows' own entries."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [filler] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


def chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover `count` rows; the same on all ranks with equal counts."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
