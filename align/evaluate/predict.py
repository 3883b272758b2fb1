"""A model's outputs on the rows of `align evaluate`: statistics of the reference tokens, and generated responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from align.data.collate import chunks, pad_left, pad_right
from align.data.end_tokens import decode_responses
from align.data.reasoning import split_sampled
from align.data.tokenize import IGNORE_INDEX
from align.engine.distributed import World
from align.engine.faults import during
from align.evaluate.inputs import EvalSetting
from align.evaluate.reader import EncodedRow
from align.generation.encoder_decoder import answer_batch
from align.generation.responses import respond_to_batch
from align.generation.sampling import uniforms
from align.maths.losses import token_logprobs
from align.models.forward import response_logits
from align.models.model_types import is_encoder_decoder
from reward_models.heads import hf_model


@dataclasses.dataclass(frozen=True, slots=True)
class ModelOutputs:
    """Outputs of a model for n rows."""

    token_statistics: list[list[float]]  # [n, 3], of the reference: sum of -log p in nats, argmax tokens, tokens
    response_ids: list[list[int]]  # generated; n empty lists when nothing is generated


@during("evaluation")
@torch.no_grad()
def run_model(
    model: nn.Module,
    setting: EvalSetting,
    world: World,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    on_progress: Callable[[int], None],
) -> ModelOutputs:
    """The model's outputs for all rows, on every rank, each of which runs its share of the batches.

    Args:
        max_new_tokens: 0 generates nothing.
        batch_size: rows per forward pass.
        on_progress: called with the number of rows that are done.
    """
    count = len(setting.rows)
    statistics = torch.zeros(count, 3, dtype=torch.float64, device=world.device)
    generated = torch.zeros(count, max_new_tokens, dtype=torch.int64, device=world.device)
    lengths = torch.zeros(count, dtype=torch.int64, device=world.device)
    sizes = [len(row.ids) for row in setting.rows]
    order = sorted(
        range(count), key=lambda index: -sizes[index]
    )  # longest first, so that running out of memory is early
    pad = int(setting.tokenizer.pad_token_id)
    pairs = is_encoder_decoder(hf_model(model).config)
    measure, respond = (_answer_statistics, answer_batch) if pairs else (_reference_statistics, respond_to_batch)
    on_progress(0)
    for number, part in enumerate(chunks(count, batch_size)):
        if number % world.size == world.rank:
            indexes = order[part]
            rows = [setting.rows[index] for index in indexes]
            statistics[indexes] = measure(model, rows, pad, world.device)
            if max_new_tokens:
                noise = uniforms(seed, "evaluate", indexes, max_new_tokens).to(world.device)
                prompts = [row.prompt_ids for row in rows]
                responses = respond(model, setting.tokenizer, prompts, noise, temperature)
                for index, ids in zip(indexes, responses, strict=True):
                    generated[index, : len(ids)] = torch.tensor(ids)
                    lengths[index] = len(ids)
        on_progress(part.stop)
    statistics, generated, lengths = world.sum(statistics), world.sum(generated), world.sum(lengths)
    response_ids = [ids[:length] for ids, length in zip(generated.tolist(), lengths.tolist(), strict=True)]
    return ModelOutputs(statistics.tolist(), response_ids)


def _reference_statistics(model: nn.Module, rows: Sequence[EncodedRow], pad: int, device: torch.device) -> Tensor:
    """`ModelOutputs.token_statistics` of B rows, [B, 3] float64."""
    prompt_ids, prompt_mask = pad_left([row.ids[: row.reference_start] for row in rows], pad)
    reference_ids, mask = pad_right([row.ids[row.reference_start :] for row in rows], pad)
    ids = torch.cat([prompt_ids, reference_ids], dim=1).to(device)
    attention_mask = torch.cat([prompt_mask, mask], dim=1).to(device)
    reference_ids, mask = reference_ids.to(device), mask.to(device)
    logits = response_logits(model, ids, attention_mask, reference_ids.shape[1])
    return _statistics(logits, reference_ids, mask)


def _answer_statistics(model: nn.Module, rows: Sequence[EncodedRow], pad: int, device: torch.device) -> Tensor:
    """The same of an encoder-decoder, whose encoder reads the prompt and whose decoder the reference."""
    source_ids, source_mask = (each.to(device) for each in pad_right([row.prompt_ids for row in rows], pad))
    padded = pad_right([row.ids[row.reference_start :] for row in rows], pad)
    target_ids, mask = (each.to(device) for each in padded)
    labels = target_ids.masked_fill(~mask, IGNORE_INDEX)  # of which the model makes what its decoder reads
    logits = model(input_ids=source_ids, attention_mask=source_mask.long(), labels=labels).logits
    return _statistics(logits, target_ids, mask)


def _statistics(logits: Tensor, reference_ids: Tensor, mask: Tensor) -> Tensor:
    nll = -token_logprobs(logits, reference_ids, 1.0).double().masked_fill(~mask, 0.0)
    is_argmax = (logits.argmax(dim=-1) == reference_ids) & mask
    return torch.stack([nll.sum(dim=1), is_argmax.sum(dim=1), mask.sum(dim=1)], dim=1)


def decode_predictions(setting: EvalSetting, response_ids: Sequence[Sequence[int]]) -> list[str]:
    """Text of each response, cut before its row's first stop string and stripped of surrounding white space."""
    texts = [
        split_sampled(setting.tokenizer, text, row.prompt_ids, ids)[1]
        for text, row, ids in zip(
            decode_responses(setting.tokenizer, response_ids), setting.rows, response_ids, strict=True
        )
    ]
    return [
        text[: min([text.index(stop) for stop in row.stop_strings if stop in text], default=len(text))].strip()
        for text, row in zip(texts, setting.rows, strict=True)
    ]
