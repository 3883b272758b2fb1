"""Inputs of `align bon`, checked before any weight is loaded: the models, and the prompts in token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from align.config.best_of_n import BestOfNRecipe
from align.config.stages import STAGES
from align.data.load import DataSettings, load_rows
from align.data.reasoning import set_scores_reasoning
from align.data.rows import Prompt
from align.data.tokenize import tokenize_prompts
from align.errors import UserError
from align.evaluate.reward_model import RewardModel, check_reward_model, check_reward_models
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.context_length import check_responses_fit
from align.models.load import load_config
from align.models.model_types import is_encoder
from align.models.tokenizer import load_tokenizer
from align.runs.manifest import check_tokenizer, read_manifest


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a run: configuration, tokenizer, rewards, prompts with token ids, and the report of `align.data.load`."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rewards: list[RewardModel]  # none, one, or the members of an ensemble
    judge: RewardModel | None
    prompts: list[tuple[Prompt, list[int]]]
    report: dict[str, Any]


def prepare_inputs(recipe: BestOfNRecipe) -> Inputs:
    """Read configurations, tokenizers, manifests and rows, and check that they match.

    Raises:
        UserError: a model is missing or of the wrong kind, models do not match, or rows cannot be used.
    """
    path, key = recipe.model_name_or_path, "model_name_or_path"
    config = load_config(path, key, recipe.trust_remote_code)
    if is_encoder(config):
        raise UserError(f"{key}: {path} is an encoder, which cannot generate; name a decoder.")
    manifest = read_manifest(path)
    if manifest is not None and not STAGES[manifest["stage"]].generates:
        raise UserError(
            f"{key}: {path} is the output of the {manifest['stage']} stage, which cannot generate; name that of sft or ppo."
        )
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs)
    check_files(AutoModelForCausalLM, path, key, config, tokenizer, attn_implementation=recipe.attn_implementation)
    check_causal(config, key, path, recipe.trust_remote_code)
    check_tokenizer(path, tokenizer, key, may_add_template=False)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)

    rewards = check_reward_models(recipe, recipe.score_reasoning, tokenizer)
    judge = None
    if (judge_path := recipe.judge_reward_model_path) is not None:
        judge = check_reward_model(judge_path, "judge_reward_model_path", recipe, recipe.score_reasoning, tokenizer)

    settings = DataSettings(train_dataset=recipe.train_dataset, on_bad_row=recipe.on_bad_row, seed=recipe.seed)
    rows = load_rows(settings, Prompt)
    prompts, skipped = tokenize_prompts(rows.train, tokenizer, recipe.max_prompt_length, recipe.on_bad_row)
    check_responses_fit([ids for _, ids in prompts], recipe.response_length, config)
    report = {**rows.report, "skipped": skipped}
    return Inputs(config, tokenizer, rewards, judge, prompts, report)
