"""Greedy responses to evaluation prompts during fine-tuning, scored by text metrics."""

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
from align.data.encoder_decoder import source_ids
from align.data.end_tokens import decode_responses
from align.data.mixture import seeded_sample
from align.data.reasoning import scored_turns, split_sampled
from align.data.rows import Demonstration, render_text, tools_of
from align.engine.distributed import World, rows_of_rank
from align.errors import UserError
from align.evaluate.metrics import external_scores, load_metric, measure
from align.generation.encoder_decoder import answer_batch
from align.generation.responses import gather_responses, respond_to_batch
from align.models.context_length import check_responses_fit
from align.models.encoder_decoder import check_answers_fit
from align.models.model_types import is_encoder_decoder

KEY = "eval_metrics"
RESPONSE_COLUMNS = ("prompt", "response", "reference")
SHOWN_ROWS = 8  # of the table


@dataclass(frozen=True, slots=True)
class ResponseEvaluation:
    """Evaluation rows to respond to, with their prompts in token ids, and the metrics of the responses."""

    rows: list[Demonstration]
    prompt_ids: list[list[int]]
    metrics: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    response_length: int
    batch_size: int
    world: World
    encoder_decoder: bool = False

    @property
    def references(self) -> list[str]:
        return [render_text(scored_turns(self.tokenizer, row.completion)).strip() for row in self.rows]

    @torch.no_grad()
    def generate(self, model: nn.Module) -> list[str]:
        """The greedy response to each prompt, on every rank; each rank generates its share. Every rank must call it.

        Ranks take the same number of steps, so `model` may be sharded. The batch size changes responses by rounding only.
        """
        world, length = self.world, self.response_length
        share = rows_of_rank(world, len(self.rows))
        responses: list[list[int]] = []
        for part in chunks(len(share), self.batch_size):
            prompts = [self.prompt_ids[index] for index in share[part]]
            noise = torch.zeros(len(prompts), length, device=world.device)
            if self.encoder_decoder:
                responses += answer_batch(model, self.tokenizer, prompts, noise, 0.0)
            else:
                responses += respond_to_batch(model, self.tokenizer, prompts, noise, 0.0, world.any_rank)
        ids = gather_responses(world, responses, length)[: len(self.rows)]  # the last rank may repeat a row
        texts = zip(decode_responses(self.tokenizer, ids), self.prompt_ids, ids, strict=True)
        return [split_sampled(self.tokenizer, text, *own)[1].strip() for text, *own in texts]

    def score(self, responses: Sequence[str]) -> dict[str, float]:
        """The values of all metrics, under the names of `align evaluate`.

        Raises:
            UserError: a metric fails.
        """
        scores: dict[str, float] = {}
        for name, metric in self.metrics.items():
            if measured := measure(metric, self.rows, responses, self.references):
                scores |= measured.scores()
            else:
                scores |= external_scores(name, metric, responses, self.references, KEY)
        return scores

    def table(self, responses: Sequence[str]) -> list[list[str]]:
        """The first few rows of prompt, response and reference."""
        rows = zip(self.rows, responses, self.references, strict=True)
        return [[render_text(row.prompt), response, reference] for row, response, reference in list(rows)[:SHOWN_ROWS]]


def load_metrics(names: Sequence[str]) -> dict[str, Any]:
    """The metrics of `eval_metrics`, by name.

    Raises:
        UserError: there is no such metric.
    """
    return {name: load_metric(name, key=KEY) for name in names}


def response_evaluation(
    recipe: SFTRecipe,
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    world: World,
) -> ResponseEvaluation | None:
    """A seeded sample of the evaluation rows that answer a prompt in text; None if the recipe has no `eval_metrics`.

    Raises:
        UserError: no such metric, no row has a prompt, or prompt and response exceed the model's context.
    """
    if not (metrics := load_metrics(recipe.eval_metrics)):
        return None
    prompted = [row for row in rows if row.prompt and not _calls_tools(row)]  # metrics compare texts
    sampled = seeded_sample(prompted, recipe.max_eval_generations, f"{recipe.seed} responses")
    if not sampled:
        raise UserError(f"{KEY}: no evaluation row has a prompt to answer; leave it out, or evaluate on other rows.")
    encode = source_ids if is_encoder_decoder(config) else encode_prompt
    ids = [encode(tokenizer, row.prompt, tools_of(row)) for row in sampled]
    check_fit = check_answers_fit if is_encoder_decoder(config) else check_responses_fit
    check_fit(ids, recipe.response_length, config, remedy=f"leave {KEY} out")
    return ResponseEvaluation(
        rows=sampled,
        prompt_ids=ids,
        metrics=metrics,
        tokenizer=tokenizer,
        response_length=recipe.response_length,
        batch_size=recipe.per_device_eval_batch_size,
        world=world,
        encoder_decoder=is_encoder_decoder(config),
    )


def _calls_tools(row: Demonstration) -> bool:
    return not isinstance(row.completion, str) and bool(row.completion[-1].get("tool_calls"))
