"""What the reward stage starts from: models, tokenizers and truths that fit, and the prompts that set its zero."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config import RewardRecipe, UserError
from align.data import Preference, Prompt, render_text
from align.models import is_encoder, load_config, load_tokenizer
from align.recipes import resolve_function
from align.stage import check_tokenizer
from align.tokenization import tokenize_prompts
from reward_models import FunctionReward, RewardSum


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
    set_padding(tokenizer)
    return Inputs(config, encoder, tokenizer, answering, answering_tokenizer, RewardSum(truths) if truths else None)


def set_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad on the right, with a token other than end-of-text.

    transformers' decoders score the last token that is not padding, so end-of-text must not be padding.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    plain = max(set(tokenizer.get_vocab().values()) - set(special))
    candidates = [tokenizer.unk_token_id, tokenizer.bos_token_id, *special, plain]
    pad = next(token for token in candidates if token not in (None, tokenizer.eos_token_id))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def zero_prompts(recipe: RewardRecipe, inputs: Inputs, rows: Sequence[Preference]) -> list[tuple[Prompt, list[int]]]:
    """Up to `normalize_prompts` different training prompts for the SFT model to answer, with its ids."""
    if inputs.answering is None:
        return []
    different = list({render_text(row.prompt): Prompt(row.prompt, row.where) for row in rows}.values())
    some = random.Random(recipe.seed).sample(different, min(recipe.normalize_prompts, len(different)))
    limit = positions(load_config(inputs.answering, recipe, "sft_model_path")) - recipe.response_length
    return tokenize_prompts(some, inputs.answering_tokenizer, limit, "skip")[0]


def positions(config: PretrainedConfig) -> int:
    """Most tokens that the model reads."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9)
