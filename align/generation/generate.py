"""Sample responses from a language model.

Noise belongs to the response, not to the process: that of response i depends on the seed and on i alone. However
prompts are split into batches and over ranks, and wherever a run is resumed, the same responses are sampled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from align.data.end_tokens import end_ids
from align.engine.engine import Engine
from align.generation.decoder import decoder
from align.generation.ending import Ending
from align.generation.kv_cache import compaction_order
from align.generation.sampling import sample_token
from align.models.forward import to_device

# Tokens between two looks at which rows have ended, for which Python has to wait for a GPU. On a CPU it need not wait.
END_INTERVAL = 8


@torch.no_grad()
def generate(
    model: nn.Module | Engine,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    noise: Tensor,
    temperature: float,
    ending: Ending,
    any_rank_unfinished: Callable[[bool], bool] = bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a response to each prompt from softmax(logits / temperature), without truncating the distribution.

    Temperature 0 is greedy decoding, with log-probabilities at temperature 1.

    Args:
        model: a causal language model.
        prompt_ids, prompt_mask: [B, Q], padded on the left; the mask is True for real tokens.
        noise: [B, T] in [0, 1), one number per token; T is the maximum response length.
        ending: what ends a response.
        any_rank_unfinished: whether any rank has unfinished rows, given whether this one has. Ranks that share a
            sharded model must all take the same number of steps; by default a rank decides alone.

    Returns:
        response_ids, mask, logprobs: [B, T'] with T' <= T, up to and including what ends a response, padded on the right.
        Log-probabilities are float32, in nats, of the distributions that were sampled from; 0 in the padding.
    """
    device = prompt_ids.device
    rows = torch.arange(len(prompt_ids), device=device)  # the response that each row of the batch belongs to
    pad = int(ending.tokenizer.pad_token_id)
    responses = torch.full(noise.shape, pad, device=device)
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=device)
    logprobs = torch.zeros(noise.shape, device=device)
    ends = to_device(torch.tensor(end_ids(ending.tokenizer)), device)
    interval = 1 if device.type == "cpu" or ending.stop_strings else END_INTERVAL
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    decoding = decoder(model, prompt_ids, prompt_mask, noise.shape[1])
    for step in range(noise.shape[1]):
        tokens, sampled_logprobs = sample_token(decoding.logits(), noise[rows, step], temperature)
        decoding.append(tokens)
        responses[rows, step] = tokens.masked_fill(~alive, pad)
        logprobs[rows, step] = sampled_logprobs.masked_fill(~alive, 0.0)
        mask[rows, step] = alive
        if ending.stop_strings:
            alive = alive & ~ending.ended(responses[rows, : step + 1], torch.full_like(rows, step + 1))
        else:
            alive = alive & ~torch.isin(tokens, ends)
        if (step + 1) % interval:
            continue
        flags = alive.tolist()
        done = not any(flags)
        if not any_rank_unfinished(not done):
            break
        if not all(flags):  # drop finished rows, but keep one to run along while other ranks are unfinished
            flags[0] |= done
            order = compaction_order(flags)
            index = to_device(torch.tensor(order), device)
            decoding.keep(order, index)
            rows, alive = rows[index], alive[index]
    length = int(mask.sum(dim=1).max())
    return responses[:, :length], mask[:, :length], logprobs[:, :length]
