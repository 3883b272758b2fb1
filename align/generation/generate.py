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
from align.generation.captured import Step, captured
from align.generation.decoder import decoder
from align.generation.ending import Ending
from align.generation.kv_cache import compaction_order
from align.generation.sampling import sample_token
from align.models.forward import to_device

# Tokens between two looks at which rows have ended, for which Python has to wait for a GPU. On a CPU it need not wait.
END_INTERVAL = 8
LEAVING = 4  # with captured steps, each change of the rows costs a capture: rows leave once a quarter of them has ended
REFILL = 8  # a pass over waiting prompts, in which the other rows rest, pays once an eighth of the batch is free


@torch.no_grad()
def generate(
    model: nn.Module | Engine,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    noise: Tensor,
    temperature: float,
    ending: Ending,
    any_rank_unfinished: Callable[[bool], bool] | None = None,
    batch_size: int | None = None,
    capture: Callable[[Step], Step] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a response to each prompt from softmax(logits / temperature), without truncating the distribution.

    Temperature 0 is greedy decoding, with log-probabilities at temperature 1.

    Args:
        model: a causal language model.
        prompt_ids, prompt_mask: [N, Q], padded on the left; the mask is True for real tokens.
        noise: [N, T] in [0, 1), one number per token; T is the maximum response length.
        ending: what ends a response.
        any_rank_unfinished: whether any rank has unfinished rows, given whether this one has. Ranks that share a
            sharded model must all run as many forward passes; by default a rank decides alone.
        batch_size: rows that are decoded at once, all by default. The next prompts take the places of responses that have
            ended; where the cache has layers that rows cannot join (sliding windows, recurrent ones), once all have.
        capture: makes a decoding step of fixed shapes one operation for Python, such as `cuda_graph`; by default steps are as they are.

    Returns:
        response_ids, mask, logprobs: [N, T'] with T' <= T, up to and including what ends a response, padded on the right.
        Log-probabilities are float32, in nats, of the distributions that were sampled from; 0 in the padding.
    """
    device = prompt_ids.device
    count, length = noise.shape
    capacity = min(count, batch_size or count)
    sizes = prompt_mask.sum(dim=1).tolist()
    pad = int(ending.tokenizer.pad_token_id)
    responses = torch.full(noise.shape, pad, device=device)
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=device)
    logprobs = torch.zeros(noise.shape, device=device)
    ends = to_device(torch.tensor(end_ids(ending.tokenizer)), device)
    interval = 1 if device.type == "cpu" or ending.stop_strings else END_INTERVAL
    numbers = torch.arange(count, device=device)

    def write(logits: Tensor, rows: Tensor, places: Tensor, alive: Tensor, longest: int) -> Tensor:
        """Choose token `places` of the responses `rows` by `logits`; returns which of these go on. [n], logits [n, V]."""
        tokens, sampled = sample_token(logits, noise[rows, places], temperature)
        decoding.append(tokens)
        responses[rows, places] = tokens.masked_fill(~alive, pad)
        logprobs[rows, places] = sampled.masked_fill(~alive, 0.0)
        mask[rows, places] = alive
        if ending.stop_strings:
            return alive & ~ending.ended(responses[rows, :longest], places + 1)
        return alive & ~torch.isin(tokens, ends)

    decoding = decoder(model, length)
    if capture is not None:
        decoding = captured(decoding, capture)
    # Of each row of the batch: the response that it belongs to, the index of its next token, whether it goes on.
    rows, places, alive = numbers[:0], numbers[:0], torch.ones(0, dtype=torch.bool, device=device)
    written: list[int] = []  # `places`, as Python knows them
    begun = passes = 0  # prompts that are or were in the batch; forward passes
    while True:
        free, waiting = capacity - len(written), count - begun
        if waiting and (free == capacity or (decoding.joins and free >= min(waiting, max(1, capacity // REFILL)))):
            new = slice(begun, begun := begun + min(free, waiting))
            longest = max(sizes[new])
            logits = decoding.admit(prompt_ids[new, -longest:], prompt_mask[new, -longest:], sizes[new])
            on = write(logits, numbers[new], places.new_zeros(len(logits)), alive.new_ones(len(logits)), 1)
            rows, places = torch.cat([rows, numbers[new]]), torch.cat([places, places.new_ones(len(logits))])
            alive = torch.cat([alive, on])
            written += [1] * len(logits)
        elif written:
            written = [place + 1 for place in written]
            alive = write(decoding.logits(), rows, places, alive, max(written))
            places = places + 1
        else:  # other ranks are not done: a pass that is not used
            decoding.admit(prompt_ids[:1], prompt_mask[:1], sizes[:1])
            decoding.keep([], numbers[:0])
        passes += 1
        looks = passes % interval == 0
        flags = alive.tolist() if looks else [True] * len(written)
        flags = [goes_on and place < length for goes_on, place in zip(flags, written, strict=True)]
        done = begun == count and not any(flags)
        if done if any_rank_unfinished is None else looks and not any_rank_unfinished(not done):
            break
        ended = flags.count(False)
        if ended and (capture is None or ended * LEAVING >= len(flags) or max(written) == length):
            order = compaction_order(flags)
            index = to_device(torch.tensor(order, dtype=torch.int64), device)
            decoding.keep(order, index)
            rows, places, alive = rows[index], places[index], alive[index]
            written = [written[row] for row in order]
    longest = int(mask.sum(dim=1).max())
    return responses[:, :longest], mask[:, :longest], logprobs[:, :longest]
