"""Sample responses from a language model.

Randomness belongs to the row, not to the process: the noise of response i is a function of the seed and i
alone. A batch may be cut over any number of ranks, sorted, or resumed, and the same responses come out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.engine import Engine
from align.forward import position_ids
from align.kv_cache import closed_ranks, roomy_cache


def uniforms(seed: int, purpose: str, indexes: Sequence[int], length: int) -> Tensor:
    """Noise in [0, 1) for the responses numbered `indexes`, [B, length] float32, a pure function of its arguments."""
    return torch.stack([torch.rand(length, generator=generator(seed, purpose, index)) for index in indexes])


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A random generator of its own for everything that has a name."""
    digest = hashlib.sha256("/".join(map(str, (seed, *name))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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


BLOCK = 256


def sample(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform sampling: the first whose cumulative probability exceeds the noise.

    Cumulative sums of blocks of the vocabulary find the block, and those inside it the token: one sum over everything
    would take longer than all else here.

    Args:
        logits: [B, V].
        noise: [B] in [0, 1).
        temperature: 0 takes the likeliest token, whatever the noise.

    Returns:
        tokens [B]; their log-probabilities [B] float32, nats, at temperature 1 if it is 0.
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
        # Rounding may leave none beyond the threshold: then the block's likeliest.
        place = torch.where(beyond.any(dim=-1), beyond.int().argmax(dim=-1), inside.argmax(dim=-1))
        tokens = block * BLOCK + place[:, None]
    logprobs = scaled.gather(1, tokens) - top - total.log()
    return tokens.squeeze(1), logprobs.squeeze(1)


@torch.no_grad()
def generate(
    model: nn.Module | Engine,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    noise: Tensor,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    anyone: Callable[[bool], bool] = bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a response to each prompt from softmax(logits / temperature), the whole distribution.

    At temperature 0 the likeliest tokens, with their log-probabilities at temperature 1.

    Args:
        model: a causal language model that takes a key-value cache.
        prompt_ids, prompt_mask: [B, Q], padded on the left.
        noise: [B, T]; T is the most tokens of a response.
        anyone: given whether this rank has unfinished rows, tells whether any rank has. Under a sharded model
            all ranks must take the same number of steps.

    Returns:
        response_ids, mask and logprobs [B, T'] with T' <= T: up to and including end-of-text, padded on the right;
        log-probabilities (float32, nats) are those of the distributions that were sampled from.
    """
    count, width = prompt_ids.shape
    rows = torch.arange(count, device=prompt_ids.device)  # which response each row of the batch is
    responses = torch.full(noise.shape, pad_token_id, device=prompt_ids.device)
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=prompt_ids.device)
    logprobs = torch.zeros(noise.shape, device=prompt_ids.device)
    cache = roomy_cache((model.module if isinstance(model, Engine) else model).config, width + noise.shape[1])
    ids, positions = prompt_ids, position_ids(prompt_mask)
    real = F.pad(prompt_mask, (0, noise.shape[1]), value=True)
    done = False
    for step in range(noise.shape[1]):
        output = model(
            input_ids=ids,
            attention_mask=real[:, : width + step].long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        positions = positions[:, -1:] + 1
        if not done:
            tokens, chances = sample(output.logits[:, -1], noise[rows, step], temperature)
            responses[rows, step], logprobs[rows, step], mask[rows, step] = tokens, chances, True
            ids, alive = tokens[:, None], tokens != eos_token_id
            done = not alive.any()
            if not alive.all():  # rows that have ended stop costing anything, but for one that others may wait with
                alive[0] |= done
                order = closed_ranks(alive)
                cache.batch_select_indices(order)
                rows, ids, positions, real = (tensor[order] for tensor in (rows, ids, positions, real))
        if not anyone(not done):
            break
    length = int(mask.sum(dim=1).max())
    return responses[:, :length], mask[:, :length], logprobs[:, :length]


def chunks(count: int, size: int) -> list[slice]:
    """`count` rows in pieces of at most `size`; the pieces depend on nothing else, so ranks stay in step."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
