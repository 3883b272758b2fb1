"""Seeded noise, one stream per response, and sampling a token from logits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 256  # logits whose probabilities are summed before the search


def uniforms(seed: int, purpose: str, indexes: Sequence[int], length: int) -> Tensor:
    """Noise in [0, 1) for the responses numbered `indexes`, [B, length] float32. Row i depends on no other index."""
    return torch.stack([torch.rand(length, generator=generator(seed, purpose, index)) for index in indexes])


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A random generator for each name."""
    return torch.Generator().manual_seed(seed_of(seed, *name))


def seed_of(seed: int, *name: str | int) -> int:
    """A seed for each name: a hash of `seed` and `name`, 63 bits."""
    digest = hashlib.sha256("/".join(map(str, (seed, *name))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_token(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform sampling: the first whose cumulative probability exceeds the noise.

    The search is in two levels, first among the sums of blocks of the vocabulary, then within one block: a cumulative
    sum over the vocabulary would take longer than everything else here.

    Args:
        logits: [B, V].
        noise: [B] in [0, 1).
        temperature: 0 takes the most likely token, whatever the noise.

    Returns:
        tokens [B]; their log-probabilities [B] float32, nats, at temperature 1 if `temperature` is 0.
    """
    scaled = logits.float()
    if temperature not in (0, 1):
        scaled = scaled / temperature
    rows, vocabulary = scaled.shape
    top = scaled.amax(dim=-1, keepdim=True)
    weights = scaled.new_zeros(rows, -(-vocabulary // BLOCK) * BLOCK)
    torch.sub(scaled, top, out=weights[:, :vocabulary]).exp_()
    weights = weights.view(rows, -1, BLOCK)
    ends = weights.sum(dim=-1).cumsum(dim=-1)
    total = ends[:, -1:]
    if temperature == 0:
        tokens = scaled.argmax(dim=-1, keepdim=True)
    else:
        threshold = noise[:, None] * total
        block = (ends <= threshold).sum(dim=-1, keepdim=True).clamp(max=ends.shape[1] - 1)
        inside = weights.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1)
        before = ends.gather(1, block) - inside.sum(dim=-1, keepdim=True)
        beyond = (inside.cumsum(dim=-1) + before > threshold) & (inside > 0)
        # If rounding leaves no token beyond the threshold, take the most likely one of the block.
        place = torch.where(beyond.any(dim=-1), beyond.int().argmax(dim=-1), inside.argmax(dim=-1))
        tokens = block * BLOCK + place[:, None]
    logprobs = scaled.gather(1, tokens) - top - total.log()
    return tokens.squeeze(1), logprobs.squeeze(1)
