"""Spread of scores among samples of one prompt; a reward without it gives PPO no signal (arXiv 2503.15477)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from align.data.reasoning import split_sampled
from align.data.rows import Demonstration, Preference, Prompt, render_text
from align.data.token_ids import decode_response
from align.data.tokenize import tokenize_prompts
from align.engine.distributed import World, rows_of_rank
from align.evaluate.bootstrap import Floats
from align.evaluate.statistics import wilson_interval
from align.generation.responses import gather_responses, respond_to_batch
from align.generation.sampling import uniforms
from align.judge.pairs import number_prompts, score_with_interval
from align.judge.rows import as_pair


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample a policy: responses per prompt, maximum length in tokens, temperature, batch size, seed."""

    num_generations: int
    response_length: int
    temperature: float
    batch_size: int
    seed: int


def sampled_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    prompts: Sequence[Prompt],
    max_prompt_length: int,
    sampling: Sampling,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Preference]:
    """Sample `num_generations` responses to each prompt; returns them as `chosen` of one row each, on every rank.

    Args:
        max_prompt_length: longer prompts are skipped, in tokens.
        on_batch: called after each batch with its number of responses.
    """
    usable, _ = tokenize_prompts(prompts, tokenizer, max_prompt_length, "skip")
    repeated = [each for each in usable for _ in range(sampling.num_generations)]
    responses: list[list[int]] = []
    mine = rows_of_rank(world, len(repeated))
    for start in range(0, len(mine), sampling.batch_size):
        part = mine[start : start + sampling.batch_size]
        noise = uniforms(sampling.seed, "spread of scores", part, sampling.response_length).to(world.device)
        with torch.no_grad():
            responses += respond_to_batch(model, tokenizer, [repeated[i][1] for i in part], noise, sampling.temperature)
        on_batch(len(part))
    responses = gather_responses(world, responses, sampling.response_length)[: len(repeated)]
    rows = []
    for (prompt, prompt_ids), ids in zip(repeated, responses, strict=True):
        text = decode_response(tokenizer, prompt.prompt, prompt_ids, ids)
        answer = split_sampled(tokenizer, text, prompt_ids, ids)[1]
        rows.append(as_pair(prompt.prompt, answer, answer, prompt.where, prompt.extra))
    return rows


def rows_of_file(rows: Sequence[Demonstration]) -> list[Preference]:
    """The rows of `samples_dataset`, with their completions as `chosen`."""
    return [Preference(row.prompt, row.completion, row.completion, row.where, row.extra) for row in rows]


def spread(rows: Sequence[Preference], scores: Floats, iterations: int, seed: int) -> dict[str, Any]:
    """Standard deviation of scores within prompts and over all samples, and the share of flat prompts.

    A prompt is flat if all its samples have the same score. Prompts with a single sample are left out.

    Args:
        scores: [n], of the rows' `chosen`.
    """
    prompts = number_prompts([render_text(row.prompt) for row in rows])
    counts = np.bincount(prompts)
    kept = np.flatnonzero(counts > 1)
    used = np.isin(prompts, kept)
    deviations = np.array([scores[prompts == each].std(ddof=1) for each in kept])
    flat = np.array([len(set(scores[prompts == each].tolist())) == 1 for each in kept], dtype=np.float64)
    total = float(scores[used].std()) if used.any() else 0.0
    ones, places = np.ones(len(kept)), np.arange(len(kept))

    def mean(values: Floats) -> dict[str, Any]:
        return score_with_interval(
            np.column_stack([values, ones]), lambda sums: float(sums[0] / sums[1]), places, iterations, seed
        )

    within = mean(deviations)
    low, high = (
        wilson_interval(float(flat.sum()), len(flat)) if len(flat) else (None, None)
    )  # resampled zeros are zeros
    return {
        "within_prompts": within,
        "over_all_samples": total,
        "ratio": within["value"] / total if within["value"] is not None and total else None,
        "flat_prompts": {**mean(flat), "low": low, "high": high},
        "samples": int(used.sum()),
    }
