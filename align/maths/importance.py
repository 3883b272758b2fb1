"""Importance weights of responses that another program sampled than the one that trains on them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Importance:
    """Weights of tokens, and what they say about the sampler.

    Attributes:
        weights: [B, T] float32, 0 outside the mask.
        cut: share of the real tokens whose ratio was above the cap.
        effective: effective sample size of the real tokens as a share of their number, (sum w)^2 / (n sum w^2)
            (Kish 1965): 1 if all weights are equal.
    """

    weights: Tensor
    cut: float
    effective: float


def importance(log_ratio: Tensor, mask: Tensor, mode: str, cap: float) -> Importance:
    """Weights p / q of tokens sampled from q and trained as if sampled from p (TIS: Yao et al. 2025; names as in TRL).

    A ratio is that of the token, or of the whole response (`sequence_...`); above the cap it becomes the cap (`..._truncate`),
    which bounds the variance, or 0 (`..._mask`), which leaves the token or response out.

    Args:
        log_ratio: log p - log q, [B, T] nats; p of the model that is trained, before its first step.
        mask: [B, T], True on real tokens.
        mode: token_truncate, token_mask, sequence_truncate or sequence_mask.
        cap: largest ratio, above 0.
    """
    log_ratio = log_ratio.masked_fill(~mask, 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    above = ratio > cap
    weights = ratio.masked_fill(above, cap if mode.endswith("truncate") else 0.0) * mask
    count, squares = mask.sum(), weights.double().square().sum()
    effective = float(weights.double().sum() ** 2 / (count * squares)) if squares else 0.0
    return Importance(weights, float((above & mask).sum() / count), effective)
