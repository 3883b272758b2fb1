"""Padding on the left and on the right, and the slices of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B, Q] int64 padded on the left, and their mask [B, Q] bool."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows of numbers -> [B, S] int64 padded on the right, and their mask [B, S] bool."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [filler] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


def chunks(count: int, size: int) -> list[slice]:
    """`count` rows in pieces of at most `size`; the pieces depend on nothing else, so ranks stay in step."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
