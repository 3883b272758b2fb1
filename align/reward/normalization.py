"""Normalization of the score (arXiv 2009.01325, 2203.02155): responses of the SFT model get mean score 0."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from datasets import Dataset

from align.data.reasoning import split_sampled
from align.data.rows import Preference, Prompt, render_text, tools_of
from align.data.token_ids import decode_response
from align.data.tokenize import tokenize_prompts
from align.engine.distributed import World, rows_of_rank
from align.engine.engine import Engine
from align.evaluate.reward_model import encode_for_reward
from align.generation.responses import gather_responses, unpadded
from align.generation.sampler import PromptBatch, Sampler
from align.generation.scoring import score_ids
from align.models.context_length import max_positions
from align.models.model_types import is_encoder_decoder
from align.reward.inputs import RewardInputs
from align.runs.manifest import tokenizer_digest
from reward_models.trained import ModelReward

PURPOSE = "zero of the score"  # seeds the sampling noise: another text means other responses, and another mean


def normalization_prompts(
    inputs: RewardInputs, rows: Sequence[Preference], *, count: int, response_length: int, seed: int
) -> list[tuple[Prompt, list[int]]]:
    """Up to `count` distinct training prompts with their ids for the SFT model; none without one.

    Prompts that leave no room for `response_length` tokens are skipped.
    """
    if inputs.sft is None:
        return []
    distinct = list({render_text(row.prompt): _prompt_of(row) for row in rows}.values())
    prompts = random.Random(seed).sample(distinct, min(count, len(distinct)))
    limit = (max_positions(inputs.sft.config) or sys.maxsize) - response_length
    return tokenize_prompts(prompts, inputs.sft.tokenizer, limit, "skip")[0]


def _prompt_of(row: Preference) -> Prompt:
    tools = tools_of(row)
    return Prompt(row.prompt, row.where, {"tools": tools} if tools else {})


def sft_responses(
    model: Engine,
    world: World,
    inputs: RewardInputs,
    prompts: Sequence[tuple[Prompt, list[int]]],
    *,
    response_length: int,
    batch_size: int,
    seed: int,
) -> list[list[int]]:
    """Prompts with responses of the SFT model, sampled at temperature 1, in ids of the reward model. On every rank."""
    assert inputs.sft is not None
    sampler = Sampler(inputs.sft.tokenizer, 1.0, response_length, batch_size, seed)
    mine = rows_of_rank(world, len(prompts))
    batch = PromptBatch([prompts[i][0] for i in mine], [prompts[i][1] for i in mine], PURPOSE, mine)
    samples = sampler.sample(model, world, batch)
    responses = gather_responses(world, unpadded(samples.response_ids, samples.mask), response_length)
    responses = responses[: len(prompts)]  # the last rank may repeat a row
    vocabularies = [tokenizer_digest(each)["vocabulary"] for each in (inputs.tokenizer, inputs.sft.tokenizer)]
    pairs = is_encoder_decoder(inputs.config)
    same = vocabularies[0] == vocabularies[1] and not (inputs.is_encoder or pairs)
    own, sequences = inputs.sft.tokenizer, []
    for (prompt, prompt_ids), ids in zip(prompts, responses, strict=True):
        text = decode_response(own, prompt.prompt, prompt_ids, ids)
        reasoning, answer = split_sampled(own, text, prompt_ids, ids)
        if same and not reasoning:
            sequences.append(prompt_ids + ids)
        else:
            encoder, tools = inputs.is_encoder, tools_of(prompt)
            sequences.append(
                encode_for_reward(inputs.tokenizer, encoder, prompt.prompt, answer, tools, ends_once=pairs)
            )
    return sequences


def chosen_responses(rows: Dataset, count: int, seed: int) -> list[list[int]]:
    """Prompt and chosen response of up to `count` random rows, for when there is no SFT model to sample from."""
    indexes = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index]["chosen_ids"] for index in indexes]


def normalize_scores(reward: ModelReward, world: World, ids: Sequence[list[int]]) -> tuple[float, float]:
    """Subtract the mean score of these sequences from every score from here on.

    Returns:
        Their mean and standard deviation before.
    """
    scores = score_ids(reward, world, ids).double()
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    reward.model.config.score_mean = mean
    return mean, std
