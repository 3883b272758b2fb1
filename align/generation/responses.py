"""Responses as lists of token ids and as text: sampled for one batch of prompts, gathered over ranks, decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.data.collate import pad_left, pad_right
from align.data.reasoning import split_sampled
from align.data.rows import Prompt, as_response
from align.data.token_ids import decode_response
from align.engine.distributed import World
from align.engine.engine import Engine
from align.generation.ending import Ending
from align.generation.generate import generate
from reward_models.responses import Responses


class Sampled(Protocol):
    """Prompts and responses in ids; masks are True on real tokens."""

    prompt_ids: Tensor  # [B, Q] int64
    prompt_mask: Tensor  # [B, Q] bool
    response_ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool


def respond_to_batch(
    model: nn.Module | Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    noise: Tensor,
    temperature: float,
    any_rank_unfinished: Callable[[bool], bool] | None = None,
) -> list[list[int]]:
    """A response to each of B prompts of token ids, up to and including end-of-text, without padding.

    Args:
        noise: [B, T] on the model's device; unused at temperature 0, except for its shape.
        model, temperature, any_rank_unfinished: as for `generate`.
    """
    padded = pad_left(prompts, int(tokenizer.pad_token_id))
    prompt_ids, prompt_mask = (tensor.to(noise.device) for tensor in padded)
    ids, mask, _ = generate(model, prompt_ids, prompt_mask, noise, temperature, Ending(tokenizer), any_rank_unfinished)
    return unpadded(ids, mask)


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The real tokens of each row of ids [B, T], given their mask [B, T]."""
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]


def gather_responses(world: World, responses: Sequence[Sequence[int]], max_length: int) -> list[list[int]]:
    """The responses of all ranks, in rank order, on every rank.

    Args:
        responses: of this rank; every rank has as many. Responses of more than `max_length` tokens are an error.
    """
    ids, mask = pad_right([*responses, [0] * max_length], 0)  # the last row makes the width the same on all ranks
    return unpadded(*(world.gather(tensor[:-1].to(world.device)) for tensor in (ids, mask)))


def decode_responses(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch: Sampled) -> Responses:
    """The batch as reward models and reward functions take it: ids without padding, and decoded text."""
    prompt_ids, response_ids = unpadded(batch.prompt_ids, batch.prompt_mask), unpadded(batch.response_ids, batch.mask)
    texts = [
        decode_response(tokenizer, prompt.prompt, *ids)
        for prompt, *ids in zip(prompts, prompt_ids, response_ids, strict=True)
    ]
    parts = [split_sampled(tokenizer, text, *ids) for text, *ids in zip(texts, prompt_ids, response_ids, strict=True)]
    texts = [answer for _, answer in parts]
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.extra)
    return Responses(
        prompts=[prompt.prompt for prompt in prompts],
        texts=texts,
        completions=[as_response(prompt.prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        columns={name: [prompt.extra.get(name) for prompt in prompts] for name in columns},
        reasoning=[reasoning for reasoning, _ in parts],
    )
