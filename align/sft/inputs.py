"""The configuration and tokenizer of the model that fine-tuning starts from."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.sft import SFTRecipe
from align.data.reasoning import set_scores_reasoning
from align.errors import UserError
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.encoder_decoder import check_reads_no_padding, check_starts_and_ends
from align.models.load import language_model_class, load_config
from align.models.model_types import is_encoder, is_encoder_decoder
from align.models.packing import check_packing
from align.models.split_sequences import check_splits
from align.models.tokenizer import load_tokenizer
from align.models.virtual_tokens import check_takes_virtual_tokens
from align.runs.manifest import check_tokenizer
from align.sft.fused_head import has_router_loss

KEY = "model_name_or_path"


def load_config_and_tokenizer(path: str, recipe: SFTRecipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Load both, without the weights.

    Raises:
        UserError: there is no model, it is an encoder, its tokenizer is not the one it was trained with, or it does not
            keep packed examples apart.
    """
    config = load_config(path, KEY, recipe.trust_remote_code, encoder_decoder=True)
    if is_encoder(config):
        raise UserError(f"{KEY}: {path} is an encoder ({config.model_type}); name a model that generates.")
    if recipe.method in ("prompt", "prefix") and not is_encoder_decoder(config):
        check_takes_virtual_tokens(config, recipe.method, f"method: {recipe.method}: {path}", recipe.trust_remote_code)
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs)
    check_tokenizer(path, tokenizer, KEY)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)
    kernel = recipe.attn_implementation
    auto = language_model_class(config)
    check_files(auto, path, KEY, config, tokenizer, attn_implementation=kernel, trained_by=recipe)
    if is_encoder_decoder(config):
        check_starts_and_ends(config, tokenizer, KEY, path)
        check_reads_no_padding(config, KEY, path, recipe.trust_remote_code)
    else:
        check_causal(config, KEY, path, recipe.trust_remote_code)
    check_kind_of_model(recipe, config)
    return config, tokenizer


def check_kind_of_model(recipe: SFTRecipe, config: PretrainedConfig) -> None:
    """Check that the recipe has no key that a model of this kind cannot follow, and that it keeps packed examples apart.

    Raises:
        UserError: names the first.
    """
    if not is_encoder_decoder(config):
        check_packed_rows(recipe, config)
        if recipe.sequence_parallel_size > 1:
            check_split_sequences(recipe, config)
        return
    what = f"the model is an encoder-decoder ({config.model_type})"
    if recipe.sequence_parallel_size > 1:
        raise UserError(f"sequence_parallel_size: {what}, whose sequences cannot be split; leave it out.")
    for key in ("packing", "padding_free"):
        if getattr(recipe, key):
            raise UserError(
                f"{key}: {what}, whose attention between encoder and decoder does not keep several examples of a row apart; "
                "leave it out (train_sampling_strategy: group_by_length needs less padding)."
            )
    if not recipe.completion_only_loss:
        raise UserError(
            f"completion_only_loss: {what}, which reads prompts and predicts completions alone; leave it out."
        )
    if recipe.neftune_noise_alpha is not None:
        raise UserError(f"neftune_noise_alpha: {what}, and NEFTune was defined for decoders; leave it out.")


def check_split_sequences(recipe: SFTRecipe, config: PretrainedConfig) -> None:
    """Check that the model's sequences can be split over processes.

    Raises:
        UserError: they cannot, or its router's loss would be one of each part.
    """
    check_splits(config, recipe.sequence_parallel_size, recipe.trust_remote_code)
    if has_router_loss(config, recipe.trust_remote_code):
        raise UserError(
            f"sequence_parallel_size: a model of type {config.model_type} adds a loss of its router, which is not a sum over tokens "
            "and would be another one of each part; leave sequence_parallel_size out."
        )


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
