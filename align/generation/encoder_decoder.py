"""Responses of an encoder-decoder, by transformers' `generate`, with the seeded noise of the other samplers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from align.compat.peft import prefix_in_cache
from align.data.collate import pad_right
from align.data.end_tokens import end_ids
from align.generation.sampling import sample_token
from reward_models.heads import hf_model

# Of the model's own generation config: without them it would begin otherwise than it was trained to (mBART's languages).
BEGINNING = ("decoder_start_token_id", "bos_token_id", "forced_bos_token_id", "pad_token_id")


class SeededChoice(LogitsProcessor):
    """Leaves one token at each step, drawn by the noise of the row, so that a response depends on no other row.

    Args:
        noise: [B, T] in [0, 1).
    """

    def __init__(self, noise: Tensor, temperature: float):
        self.noise, self.temperature, self.step = noise, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, _ = sample_token(scores, self.noise[:, self.step], self.temperature)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@torch.no_grad()
def answer_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Sequence[int]],
    noise: Tensor,
    temperature: float,
) -> list[list[int]]:
    """A response to each of B sources of token ids, up to and including its end, without padding.

    Beam search, length penalties and the like of the model's generation config are left out.

    Args:
        model: an encoder-decoder, bare, sharded or with an adapter.
        noise: [B, T] on the model's device; unused at temperature 0, except for its shape.
        temperature: 0 takes the most likely token.
    """
    ids, mask = (each.to(noise.device) for each in pad_right(sources, int(tokenizer.pad_token_id)))
    ends = end_ids(tokenizer)
    callee: Any = getattr(model, "module", model)
    with _settings(hf_model(model), list(ends), noise.shape[1]), prefix_in_cache(callee):
        written: Tensor = callee.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            logits_processor=LogitsProcessorList([SeededChoice(noise, temperature)] if temperature else []),
        )
    return [_until_end(row, ends) for row in written[:, 1:].tolist()]  # without the token that the decoder starts from


@contextlib.contextmanager
def _settings(model: Any, ends: list[int], length: int) -> Iterator[None]:
    """Inside, the model generates greedily. Its own settings would fill in whatever is not given."""
    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in BEGINNING}
    if kept["decoder_start_token_id"] is None:
        kept["decoder_start_token_id"] = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        **kept, eos_token_id=ends, max_new_tokens=length, do_sample=False, num_beams=1
    )
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The response without the padding after its end; pad and end may be one token."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: end + 1]
