"""Sample responses from a language model.

Randomness belongs to the row, not to the process: the noise of response i is a function of the seed and i
alone. A batch may be cut over any number of ranks, sorted, or resumed, and the same responses come out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.engine.torch_engine import Engine
from align.generation.kv_cache import closed_ranks, roomy_cache
from align.generation.sampling import sample
from align.models.forward import position_ids


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
