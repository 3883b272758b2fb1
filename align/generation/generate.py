"""Sample responses from a language model.

Noise belongs to the response, not to the process: that of response i depends on the seed and on i alone. However
prompts are split into batches and over ranks, and wherever a run is resumed, the same responses are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.engine.engine import Engine
from align.generation.kv_cache import compaction_order, preallocated_cache
from align.generation.sampling import sample_token
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
    any_rank_unfinished: Callable[[bool], bool] = bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a response to each prompt from softmax(logits / temperature), without truncating the distribution.

    Temperature 0 is greedy decoding, with log-probabilities at temperature 1.

    Args:
        model: a causal language model that takes a key-value cache.
        prompt_ids, prompt_mask: [B, Q], padded on the left; the mask is True for real tokens.
        noise: [B, T] in [0, 1), one number per token; T is the maximum response length.
        any_rank_unfinished: whether any rank has unfinished rows, given whether this one has. Ranks that share a
            sharded model must all take the same number of steps; by default a rank decides alone.

    Returns:
        response_ids, mask, logprobs: [B, T'] with T' <= T, up to and including end-of-text, padded on the right.
        Log-probabilities are float32, in nats, of the distributions that were sampled from; 0 in the padding.
    """
    count, width = prompt_ids.shape
    rows = torch.arange(count, device=prompt_ids.device)  # the response that each row of the batch belongs to
    responses = torch.full(noise.shape, pad_token_id, device=prompt_ids.device)
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=prompt_ids.device)
    logprobs = torch.zeros(noise.shape, device=prompt_ids.device)
    config: Any = (model.module if isinstance(model, Engine) else model).config
    cache = preallocated_cache(config, width + noise.shape[1])
    ids, positions = prompt_ids, position_ids(prompt_mask)
    attention_mask = F.pad(prompt_mask, (0, noise.shape[1]), value=True)
    done = False
    for step in range(noise.shape[1]):
        output = model(
            input_ids=ids,
            attention_mask=attention_mask[:, : width + step].long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        positions = positions[:, -1:] + 1
        if not done:
            tokens, sampled_logprobs = sample_token(output.logits[:, -1], noise[rows, step], temperature)
            responses[rows, step], logprobs[rows, step], mask[rows, step] = tokens, sampled_logprobs, True
            ids, alive = tokens[:, None], tokens != eos_token_id
            done = not alive.any()
            if not alive.all():  # drop finished rows, but keep one to run along while other ranks are unfinished
                alive[0] |= done
                order = compaction_order(alive)
                cache.batch_select_indices(order)
                rows, ids, positions, attention_mask = (
                    tensor[order] for tensor in (rows, ids, positions, attention_mask)
                )
        if not any_rank_unfinished(not done):
            break
    length = int(mask.sum(dim=1).max())
    return responses[:, :length], mask[:, :length], logprobs[:, :length]
