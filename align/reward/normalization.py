"""The zero of the score: the mean over responses of the SFT model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from datasets import Dataset

from align.config.reward import RewardRecipe
from align.data.encode import encode_pair
from align.data.rows import Preference, Prompt, render_text
from align.data.tokenize import tokenize_prompts
from align.engine.build import frozen_engine
from align.engine.distributed import World, rows_of_rank
from align.engine.sharding import sharded_load
from align.generation.responses import gather_responses, unpadded
from align.generation.sampler import PromptBatch, Sampler
from align.generation.scoring import score_ids
from align.models.context_length import max_positions
from align.models.load import load_config, load_policy
from align.reward.evaluation import frozen_dtype
from align.reward.inputs import Inputs
from align.runs.manifest import tokenizer_digest
from reward_models.trained import ModelReward


def sample_answers(
    recipe: RewardRecipe, inputs: Inputs, world: World, prompts: Sequence[tuple[Prompt, list[int]]]
) -> list[list[int]]:
    """What the SFT model answers, at temperature 1, as the reward model reads it: ids of prompt and answer, on every rank."""
    assert inputs.answering is not None
    assert inputs.answering_tokenizer is not None
    with sharded_load(recipe):
        model = load_policy(inputs.answering, recipe, frozen_dtype(recipe))
    engine = frozen_engine(model, recipe, world)
    sampler = Sampler(
        tokenizer=inputs.answering_tokenizer,
        temperature=1.0,
        response_length=recipe.response_length,
        batch_size=recipe.per_device_eval_batch_size,
        seed=recipe.seed,
    )
    mine = rows_of_rank(world, len(prompts))
    batch = PromptBatch([prompts[i][0] for i in mine], [prompts[i][1] for i in mine], "zero of the score", mine)
    samples = sampler.sample(engine, world, batch)
    answers = gather_responses(world, unpadded(samples.response_ids, samples.mask), recipe.response_length)[
        : len(prompts)
    ]
    vocabularies = [tokenizer_digest(t)["vocabulary"] for t in (inputs.tokenizer, inputs.answering_tokenizer)]
    if vocabularies[0] == vocabularies[1] and not inputs.encoder:
        return [prompt_ids + answer for (_, prompt_ids), answer in zip(prompts, answers, strict=True)]
    texts = inputs.answering_tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        encode_pair(inputs.tokenizer, prompt.prompt, text, inputs.encoder)
        for (prompt, _), text in zip(prompts, texts, strict=True)
    ]


def demonstrations(recipe: RewardRecipe, rows: Dataset) -> list[list[int]]:
    """Chosen responses instead of answers, where no model is there to answer: ids of prompt and response."""
    some = random.Random(recipe.seed).sample(range(len(rows)), min(recipe.normalize_prompts, len(rows)))
    return [rows[index]["chosen_ids"] for index in some]


def set_zero(reward: ModelReward, world: World, answers: Sequence[list[int]]) -> tuple[float, float]:
    """Make 0 the mean score of `answers` from here on; returns the mean and standard deviation that they had."""
    scores = score_ids(reward, world, answers).double()
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    reward.model.config.score_mean = mean
    return mean, std


def zero_prompts(recipe: RewardRecipe, inputs: Inputs, rows: Sequence[Preference]) -> list[tuple[Prompt, list[int]]]:
    """Up to `normalize_prompts` different training prompts for the SFT model to answer, with its ids."""
    if inputs.answering is None:
        return []
    different = list({render_text(row.prompt): Prompt(row.prompt, row.where) for row in rows}.values())
    some = random.Random(recipe.seed).sample(different, min(recipe.normalize_prompts, len(different)))
    limit = max_positions(load_config(inputs.answering, recipe, "sft_model_path")) - recipe.response_length
    return tokenize_prompts(some, inputs.answering_tokenizer, limit, "skip")[0]
