"""Inputs of `align judge-reward`, checked before weights are loaded: rewards, policy, pairs, benchmarks and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from align.config.judge_reward import JudgeRewardRecipe
from align.data.encode import encode_pair, ending_once
from align.data.load import DataSettings, load_rows
from align.data.reasoning import scored_turns, set_scores_reasoning
from align.data.rows import BadRows, Demonstration, Preference, render_text, tools_of
from align.data.sources import read_source
from align.engine.distributed import World
from align.engine.sharding import load_device
from align.engine.user_functions import user_function
from align.errors import UserError
from align.evaluate.bootstrap import Floats
from align.evaluate.inputs import load_evaluation_rows
from align.evaluate.reward_model import RewardModel, check_reward_model
from align.judge.benchmarks import Benchmark, read_benchmark
from align.judge.ratings import ratings_of
from align.judge.rows import SIDES, FunctionScorer, ModelScorer, Scorer
from align.judge.seen import pairs_trained_on
from align.judge.slices import check_columns
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.check_weights import check_finite
from align.models.context_length import max_positions
from align.models.load import load_config
from align.models.model_types import is_encoder, is_encoder_decoder
from align.models.tokenizer import load_tokenizer
from align.runs.manifest import check_template_kwargs, check_tokenizer
from reward_models.combine import RewardSum
from reward_models.load import load_reward_model
from reward_models.trained import ModelReward


@dataclass(frozen=True, slots=True)
class Policy:
    """The language model that responds to prompts."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class JudgeInputs:
    """The inputs of a card.

    Attributes:
        rewards: the reward to judge, and the second reward if the recipe names one.
        policy: the model to sample from, if any.
        training: pairs that the reward was trained on; may be empty.
        pairs: pairs to judge it on; may be empty.
        samples: several responses to each prompt, from `samples_dataset`; may be empty.
        ratings: people's ratings of the samples, [samples], if they have any.
        report: the report on the pairs from `align.data.load`.
        trained_on: how many of the pairs the reward model was trained on, by its record.
    """

    rewards: list[RewardModel | RewardSum]
    policy: Policy | None
    training: list[Preference]
    pairs: list[Preference]
    samples: list[Demonstration]
    ratings: Floats | None
    benchmarks: list[Benchmark]
    report: dict[str, Any]
    trained_on: int


def prepare_inputs(recipe: JudgeRewardRecipe) -> JudgeInputs:
    """Read configurations, tokenizers and rows, and check them.

    Raises:
        UserError: a model is missing or of the wrong kind, a function is missing, or rows cannot be used.
    """
    rewards = [reward for prefix in ("", "second_") if (reward := _reward(recipe, prefix)) is not None]
    policy = _policy(recipe, recipe.policy_path) if recipe.policy_path else None
    training: list[Preference] = []
    pairs: list[Preference] = []
    report: dict[str, Any] = {}
    if recipe.train_dataset or recipe.eval_dataset:
        training, pairs, report = load_evaluation_rows(recipe, Preference)
        pairs, bad = _encodable(pairs, rewards, recipe.on_bad_row)
        report = {**report, "bad_rows": report["bad_rows"] | bad, "evaluation_rows": len(pairs)}
        check_columns(pairs, recipe.slice_by)
    samples: list[Demonstration] = []
    if recipe.samples_dataset:
        settings = DataSettings(train_dataset=recipe.samples_dataset, on_bad_row=recipe.on_bad_row, seed=recipe.seed)
        samples = load_rows(settings, Demonstration, "samples_dataset").train
        if len({render_text(row.prompt) for row in samples}) == len(samples):
            raise UserError("samples_dataset: no prompt has two completions, and their spread is what is measured.")
    ratings = ratings_of(samples)
    benchmarks = [
        read_benchmark(str(source.path or source.generator), list(read_source(source, "benchmarks")))
        for source in recipe.benchmarks
    ]
    trained_on = pairs_trained_on(recipe.reward_model_path, pairs, report) if recipe.reward_model_path and pairs else 0
    return JudgeInputs(rewards, policy, training, pairs, samples, ratings, benchmarks, report, trained_on)


def _reward(recipe: JudgeRewardRecipe, prefix: str) -> RewardModel | RewardSum | None:
    if functions := getattr(recipe, f"{prefix}reward_funcs"):
        return RewardSum([user_function(name, f"{prefix}reward_funcs", recipe.reward_timeout) for name in functions])
    key = f"{prefix}reward_model_path"
    path = getattr(recipe, key)
    if path is None:
        return None
    found = check_reward_model(path, key, recipe, recipe.score_reasoning, None)
    check_tokenizer(path, found.tokenizer, key)
    return found


def _policy(recipe: JudgeRewardRecipe, path: str) -> Policy:
    key = "policy_path"
    config = load_config(path, key, recipe.trust_remote_code)
    if is_encoder(config):
        raise UserError(f"{key}: {path} is an encoder, which cannot generate; name a decoder.")
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs)
    check_template_kwargs(path, recipe.chat_template_kwargs, key)
    check_files(AutoModelForCausalLM, path, key, config, tokenizer, attn_implementation=recipe.attn_implementation)
    check_causal(config, key, path, recipe.trust_remote_code)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)
    limit = max_positions(config)
    if limit is not None and recipe.response_length >= limit:
        raise UserError(
            f"response_length: {path} (policy_path) reads {limit} tokens, prompt and response together, got "
            f"{recipe.response_length}; lower it."
        )
    return Policy(path, config, tokenizer)


def _encodable(
    rows: Sequence[Preference], rewards: Sequence[RewardModel | RewardSum], on_bad_row: str
) -> tuple[list[Preference], dict[str, Any]]:
    """The rows that every reward model can tokenize, and the bad rows by reason."""
    bad = BadRows()
    usable = []
    for row in rows:
        before = len(bad)
        for reward in rewards:
            if isinstance(reward, RewardModel) and len(bad) == before:
                with bad.catch(row.where):
                    for side in SIDES:
                        answer = scored_turns(reward.tokenizer, getattr(row, side))
                        ids = encode_pair(
                            reward.tokenizer, row.prompt, answer, is_encoder(reward.config), tools_of(row)
                        )
                        if is_encoder_decoder(reward.config):
                            ending_once(reward.tokenizer, ids)
        if len(bad) == before:
            usable.append(row)
    report = bad.raise_or_report(on_bad_row)
    if not usable:
        raise UserError(f"none of {len(rows)} pairs can be used ({bad.summary()}); give other rows.")
    return usable, report


def load_scorer(
    reward: RewardModel | RewardSum, recipe: JudgeRewardRecipe, world: World, on_pass: Callable[[int], None]
) -> Scorer:
    """Load a reward; every process holds the whole model.

    Args:
        on_pass: called after each batch with its number of responses.

    Raises:
        UserError: the weights do not match the configuration, or are not finite.
    """
    if isinstance(reward, RewardSum):
        return FunctionScorer(reward, world, recipe.score_reasoning, recipe.per_device_eval_batch_size, on_pass)
    try:
        model = load_reward_model(
            reward.path,
            dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            device=load_device(world),
        )
    except ValueError as error:
        raise UserError(f"{reward.key}: {error}") from error
    check_finite(model, reward.path)
    source = ModelReward(
        "reward_model",
        model.to(world.device),
        batch_size=recipe.per_device_eval_batch_size,
        max_length=max_positions(reward.config),
    )
    source.on_pass = on_pass
    return ModelScorer(source, world, reward.tokenizer, is_encoder(reward.config))
