"""What the reward stage starts from: models, tokenizers and truths that fit, and the prompts that set its zero."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.load import resolve_function
from align.config.reward import RewardRecipe
from align.errors import UserError
from align.models.load import is_encoder, load_config
from align.models.tokenizer import load_tokenizer, set_right_padding
from align.runs.manifest import check_tokenizer
from reward_models.combine import RewardSum
from reward_models.functions import FunctionReward


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known before any weight is loaded."""

    config: PretrainedConfig
    encoder: bool
    tokenizer: PreTrainedTokenizerBase
    answering: str | None  # the SFT model whose answers get mean score 0; None: the rows' chosen responses do
    answering_tokenizer: PreTrainedTokenizerBase | None
    truth: RewardSum | None


def check_inputs(recipe: RewardRecipe) -> Inputs:
    """Read configurations, tokenizers and manifests, and see that they fit.

    Raises:
        UserError: a model is missing, unfinished or of the wrong kind, or a tokenizer is not the one it was trained with.
    """
    path, key = recipe.model_name_or_path, "model_name_or_path"
    config = load_config(path, recipe, key)
    tokenizer = load_tokenizer(path, recipe)
    check_tokenizer(path, tokenizer, key, may_add_template=False)
    encoder = is_encoder(config)
    answers = not encoder and not (config.architectures or [""])[0].endswith("Classification")
    answering = recipe.sft_model_path or (path if answers else None)
    answering_tokenizer = None
    if answering is not None:
        if is_encoder(load_config(answering, recipe, "sft_model_path")):
            raise UserError(f"sft_model_path: {answering} is an encoder, which cannot answer; name the SFT model.")
        answering_tokenizer = load_tokenizer(answering, recipe)
        check_tokenizer(answering, answering_tokenizer, "sft_model_path", may_add_template=False)
    truths = [FunctionReward(name, resolve_function(name, "eval_reward_funcs")) for name in recipe.eval_reward_funcs]
    set_right_padding(tokenizer)
    return Inputs(config, encoder, tokenizer, answering, answering_tokenizer, RewardSum(truths) if truths else None)
