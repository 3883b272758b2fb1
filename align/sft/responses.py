"""What the model answers to evaluation prompts while it is fine-tuned, judged by text metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.sft import SFTRecipe
from align.data.collate import chunks
from align.data.encode import encode_prompt
from align.data.mixture import seeded_sample
from align.data.rows import Demonstration, render_text
from align.engine.distributed import World, rows_of_rank
from align.errors import UserError
from align.evaluate.metrics import foreign_scores, load_metric, measure
from align.generation.responses import gather_responses, respond_to_batch

KEY = "eval_metrics"
RESPONSE_COLUMNS = ("prompt", "response", "reference")
SHOWN_ROWS = 8  # of the table


@dataclass(frozen=True, slots=True)
class Questions:
    """Evaluation rows with their prompts in token ids, and the metrics of the answers."""

    rows: list[Demonstration]
    prompt_ids: list[list[int]]
    metrics: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    response_length: int
    batch_size: int
    world: World

    @property
    def references(self) -> list[str]:
        return [render_text(row.completion).strip() for row in self.rows]


def load_metrics(recipe: SFTRecipe) -> dict[str, Any]:
    """The metrics that the recipe names.

    Raises:
        UserError: there is no such metric.
    """
    return {name: load_metric(name, key=KEY) for name in recipe.eval_metrics}


def questions(
    recipe: SFTRecipe,
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    world: World,
) -> Questions | None:
    """A seeded sample of the evaluation rows that have a prompt; None when the recipe has no `eval_metrics`.

    Raises:
        UserError: no such metric, no row has a prompt, or prompt and response are more than the model reads.
    """
    if not (metrics := load_metrics(recipe)):
        return None
    some = seeded_sample([row for row in rows if row.prompt], recipe.max_eval_generations, f"{recipe.seed} responses")
    if not some:
        raise UserError(f"{KEY}: no evaluation row has a prompt to answer; leave it out, or evaluate on other rows.")
    ids = [encode_prompt(tokenizer, row.prompt) for row in some]
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if limit is not None and longest + recipe.response_length > limit:
        raise UserError(
            f"response_length: the longest evaluation prompt has {longest} tokens, which leaves {max(0, limit - longest)} of the "
            f"{limit} that the model reads, got {recipe.response_length}; lower it, or leave {KEY} out."
        )
    size = recipe.per_device_eval_batch_size
    return Questions(some, ids, metrics, tokenizer, recipe.response_length, size, world)


@torch.no_grad()
def respond(model: nn.Module, asked: Questions) -> list[str]:
    """The likeliest response to each prompt, on every rank, each having answered its share.

    Ranks take the same number of steps, so `model` may be sharded. A model that is padded on the left answers alike in
    every batch but for rounding.
    """
    world, length = asked.world, asked.response_length
    share = rows_of_rank(world, len(asked.rows))
    responses: list[list[int]] = []
    for part in chunks(len(share), asked.batch_size):
        prompts = [asked.prompt_ids[index] for index in share[part]]
        noise = torch.zeros(len(prompts), length, device=world.device)
        responses += respond_to_batch(model, asked.tokenizer, prompts, noise, 0.0, world.any_rank)
    ids = gather_responses(world, responses, length)[: len(asked.rows)]  # the last rank may repeat a row
    return [text.strip() for text in asked.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def judge(asked: Questions, responses: Sequence[str]) -> dict[str, float]:
    """The numbers of all metrics, as `align evaluate` has them.

    Raises:
        UserError: a metric fails.
    """
    found: dict[str, float] = {}
    for name, metric in asked.metrics.items():
        if measured := measure(metric, asked.rows, responses, asked.references):
            found |= measured.scores()
        else:
            found |= foreign_scores(name, metric, responses, asked.references, KEY)
    return found


def table(asked: Questions, responses: Sequence[str]) -> list[list[str]]:
    """The first few prompts, responses and references."""
    rows = zip(asked.rows, responses, asked.references, strict=True)
    return [[render_text(row.prompt), response, reference] for row, response, reference in list(rows)[:SHOWN_ROWS]]
