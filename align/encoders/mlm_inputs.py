"""Inputs of `align mlm`: configuration and tokenizer, checked before weights are loaded; texts in pieces; what is hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from align.compat.transformers import masked_lm_types, model_class
from align.config.encoders import MEAN_NOISE_SPAN_LENGTH, MLMRecipe
from align.data.rows import Passage
from align.encoders.masking import Masking
from align.encoders.sentence_pairs import tokenize_pairs
from align.encoders.span_corruption import SpanCorruption, check_sentinels, sentinel_ids
from align.encoders.text_infilling import TextInfilling
from align.encoders.tokenize import check_words, tokenize_passages
from align.errors import UserError
from align.models.check_files import check_files
from align.models.encoder_decoder import check_starts_and_ends
from align.models.load import load_config
from align.models.model_types import is_encoder, is_encoder_decoder
from align.models.tokenizer import load_tokenizer, set_right_padding
from align.runs.manifest import check_tokenizer


def check_mlm_inputs(recipe: MLMRecipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the encoder to start from, checked against its manifest.

    Raises:
        UserError: the model is missing, unfinished or not an encoder, or its tokenizer has no mask token.
    """
    path, key = recipe.model_name_or_path, "model_name_or_path"
    config = load_config(path, key, recipe.trust_remote_code, encoder_decoder=True)
    pairs = is_encoder_decoder(config)
    if not pairs and recipe.mean_noise_span_length != MEAN_NOISE_SPAN_LENGTH:
        raise UserError(
            f"mean_noise_span_length: is for encoder-decoders, got {path} ({config.model_type}); leave it out."
        )
    for name in ("whole_word_mask", "next_sentence_prediction"):
        if pairs and getattr(recipe, name):
            raise UserError(f"{name}: is for encoders, got {path} ({config.model_type}); leave it out.")
    if not pairs and not (is_encoder(config) and config.model_type in masked_lm_types()):
        raise UserError(
            f"{key}: {path} ({config.model_type}) is not an encoder with a masked language model in transformers; name a BERT-like one, a T5-like "
            "encoder-decoder, or continue the pre-training of a decoder with the sft stage."
        )
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs)
    check_tokenizer(path, tokenizer, key)
    check_files(
        model_to_train(recipe, config),
        path,
        key,
        config,
        tokenizer,
        new_head=not pairs,
        attn_implementation=recipe.attn_implementation,
        trained_by=recipe,
    )
    if pairs:
        check_starts_and_ends(config, tokenizer, key, path)
        check_sentinels(
            tokenizer, config, path, max_length=recipe.max_length, density=recipe.mlm_probability,
            mean_span_length=recipe.mean_noise_span_length,
        )  # fmt: skip
    elif tokenizer.mask_token_id is None:
        raise UserError(f"{path}: the tokenizer has no mask token; set `mask_token` in its tokenizer_config.json.")
    if recipe.whole_word_mask:
        check_words(tokenizer, path)
    set_right_padding(tokenizer)
    return config, tokenizer


def model_to_train(recipe: MLMRecipe, config: PretrainedConfig) -> Any:
    """The auto class of the model with the heads that the recipe trains.

    Raises:
        UserError: transformers has no head for next-sentence prediction on this model.
    """
    if is_encoder_decoder(config):
        return AutoModelForSeq2SeqLM
    if not recipe.next_sentence_prediction:
        return AutoModelForMaskedLM
    cls = model_class(AutoModelForPreTraining, config)
    with torch.device("meta"):
        heads = [name for name, _ in cls(config).named_modules()] if cls is not None else []
    if not any(name.endswith("seq_relationship") for name in heads):
        raise UserError(
            f"next_sentence_prediction: transformers has no head for it on models of type {config.model_type}; leave it out, or "
            "name a BERT."
        )
    return AutoModelForPreTraining


def cut(
    recipe: MLMRecipe, rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, length: int, key: str
) -> Dataset:
    """The texts in pieces, or in pairs of pieces, of up to `length` tokens; arguments and errors as of `tokenize_pairs`."""
    if recipe.next_sentence_prediction:
        return tokenize_pairs(rows, tokenizer, length, recipe.seed, key, recipe.whole_word_mask)
    return tokenize_passages(rows, tokenizer, length, recipe.whole_word_mask)


def corruption(
    recipe: MLMRecipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> Masking | SpanCorruption:
    """The collator that hides what the model has to predict."""
    if not is_encoder_decoder(config):
        return Masking(tokenizer, recipe.mlm_probability, recipe.seed, recipe.whole_word_mask)
    start = int(config.decoder_start_token_id)
    collator = SpanCorruption if sentinel_ids(tokenizer) else TextInfilling
    return collator(tokenizer, recipe.mlm_probability, recipe.mean_noise_span_length, recipe.seed, start)
