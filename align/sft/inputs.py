"""The configuration and tokenizer of the model that fine-tuning starts from."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from align.config.sft import SFTRecipe
from align.data.reasoning import set_scores_reasoning
from align.errors import UserError
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.load import load_config
from align.models.model_types import is_encoder
from align.models.packing import check_packing
from align.models.tokenizer import load_tokenizer
from align.models.virtual_tokens import check_takes_virtual_tokens
from align.runs.manifest import check_tokenizer

KEY = "model_name_or_path"


def load_config_and_tokenizer(path: str, recipe: SFTRecipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Load both, without the weights.

    Raises:
        UserError: there is no model, it is an encoder, its tokenizer is not the one it was trained with, or it does not
            keep packed examples apart.
    """
    config = load_config(path, KEY, recipe.trust_remote_code)
    if is_encoder(config):
        raise UserError(f"{KEY}: {path} is an encoder ({config.model_type}); name a model that generates.")
    if recipe.method in ("prompt", "prefix"):
        check_takes_virtual_tokens(config, recipe.method, f"method: {recipe.method}: {path}", recipe.trust_remote_code)
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs)
    check_tokenizer(path, tokenizer, KEY)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)
    kernel = recipe.attn_implementation
    check_files(AutoModelForCausalLM, path, KEY, config, tokenizer, attn_implementation=kernel, trained_by=recipe)
    check_causal(config, KEY, path, recipe.trust_remote_code)
    check_packed_rows(recipe, config)
    return config, tokenizer


def check_packed_rows(recipe: SFTRecipe, config: PretrainedConfig) -> None:
    """Check that the model keeps examples apart, if the recipe packs them or concatenates rows.

    Raises:
        UserError: it does not.
    """
    for key in ("packing", "padding_free"):
        if getattr(recipe, key):
            evaluates = bool(recipe.eval_dataset) or recipe.eval_fraction > 0
            rows = max(recipe.per_device_train_batch_size, recipe.per_device_eval_batch_size if evaluates else 0)
            tokens = rows * recipe.max_length
            check_packing(config, key, recipe.trust_remote_code, recipe.attn_implementation, tokens)
            return
