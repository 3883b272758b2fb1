"""Means over real tokens. A mask is True where a token is real; masked entries never contribute."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True; both of one shape, the result a scalar. NaN under the mask is ignored."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by n) of `values` where `mask` is True, a scalar."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the real entries; masked ones become 0.

    The variance is the biased one of lm-human-preferences. With `shift_mean=False` the mean is added
    back, which is for rewards only: their sign has a meaning.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def last_index(mask: Tensor) -> Tensor:
    """Index of the last True of each row, [B] int64, for masks [B, T] padded on either side; 0 for empty rows."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).amax(dim=1)
