"""What a model does with the rows of `align evaluate`: how it judges the references, and what it writes itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from align.config.evaluate import EvaluateRecipe
from align.data.collate import chunks, pad_left, pad_right
from align.engine.distributed import World
from align.evaluate.inputs import Condition
from align.generation.responses import respond_to_batch
from align.generation.sampling import uniforms
from align.maths.losses import token_logprobs
from align.models.forward import response_logits


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """What a model does with n rows."""

    tokens: list[list[float]]  # of the reference: sum of -log p in nats, tokens that are the likeliest, tokens
    ids: list[list[int]]  # of what it writes itself; empty when nothing was asked for


@torch.no_grad()
def answer(
    model: nn.Module,
    condition: Condition,
    recipe: EvaluateRecipe,
    world: World,
    generates: bool,
    tell: Callable[[int], None],
) -> Answers:
    """What the model does with all rows, on every rank, each having worked on its share of the batches."""
    count = len(condition.prompts)
    tokens = torch.zeros(count, 3, dtype=torch.float64, device=world.device)
    written = torch.zeros(count, recipe.max_new_tokens if generates else 0, dtype=torch.int64, device=world.device)
    lengths = torch.zeros(count, dtype=torch.int64, device=world.device)
    sizes = [len(p) + len(a) for p, a in zip(condition.prompt_ids, condition.answer_ids, strict=True)]
    order = sorted(range(count), key=lambda index: -sizes[index])  # the longest first: what does not fit fails at once
    tell(0)
    for number, part in enumerate(chunks(count, recipe.per_device_eval_batch_size)):
        if number % world.size == world.rank:
            rows = order[part]
            tokens[rows] = _judge_reference(model, condition, rows, world.device)
            if generates:
                noise = uniforms(recipe.seed, "evaluate", rows, recipe.max_new_tokens).to(world.device)
                prompts = [condition.prompt_ids[row] for row in rows]
                responses = respond_to_batch(model, condition.tokenizer, prompts, noise, recipe.temperature)
                for row, ids in zip(rows, responses, strict=True):
                    written[row, : len(ids)] = torch.tensor(ids)
                    lengths[row] = len(ids)
        tell(part.stop)
    tokens, written, lengths = world.sum(tokens), world.sum(written), world.sum(lengths)
    written_ids = [row[:length] for row, length in zip(written.tolist(), lengths.tolist(), strict=True)]
    return Answers(tokens.tolist(), written_ids)


def _judge_reference(model: nn.Module, condition: Condition, rows: Sequence[int], device: torch.device) -> Tensor:
    """Statistics of the references' tokens as `Answers` has them, [B, 3] float64."""
    pad = int(condition.tokenizer.pad_token_id)
    prompts, prompt_mask = pad_left([condition.prompt_ids[row] for row in rows], pad)
    answers, mask = pad_right([condition.answer_ids[row] for row in rows], pad)
    ids, real = (torch.cat(pair, dim=1).to(device) for pair in ((prompts, answers), (prompt_mask, mask)))
    answers, mask = answers.to(device), mask.to(device)
    logits = response_logits(model, ids, real, answers.shape[1])
    nll = -token_logprobs(logits, answers, 1.0).double().masked_fill(~mask, 0.0)
    likeliest = (logits.argmax(dim=-1) == answers) & mask
    return torch.stack([nll.sum(dim=1), likeliest.sum(dim=1), mask.sum(dim=1)], dim=1)


def predicted(condition: Condition, answers: Answers) -> list[str]:
    """What was written, up to the first stop string, without white space around it."""
    texts = condition.tokenizer.batch_decode(answers.ids, skip_special_tokens=True)
    cut = [
        text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]
        for text, stops in zip(texts, condition.stops, strict=True)
    ]
    return [text.strip() for text in cut]
