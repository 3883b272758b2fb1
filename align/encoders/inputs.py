"""What a stage that puts a head on a backbone starts from: configuration and tokenizer, checked before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from align.compat.transformers import has_auto_class
from align.config.base import TrainerRecipe
from align.errors import UserError
from align.models.check_files import check_files
from align.models.encoder_decoder import check_classifier_exists
from align.models.load import load_config
from align.models.model_types import is_encoder
from align.models.tokenizer import load_tokenizer, set_right_padding
from align.runs.manifest import check_tokenizer


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """The starting point of the stage; the tokenizer pads on the right."""

    config: PretrainedConfig
    is_encoder: bool
    tokenizer: PreTrainedTokenizerBase


def check_head_inputs(recipe: TrainerRecipe, path: str, auto: Any, *, of_encoders: bool = False) -> HeadInputs:
    """Load configuration and tokenizer of the model to start from, and check them against its manifest.

    Args:
        path: `model_name_or_path`.
        auto: the class that puts the head on it, such as `AutoModelForSequenceClassification`.
        of_encoders: whether decoders are refused.

    Raises:
        UserError: the model is missing, unfinished or of the wrong kind, or the tokenizer is not the one it was trained
            with.
    """
    key = "model_name_or_path"
    classifies = auto is AutoModelForSequenceClassification
    config = load_config(path, key, recipe.trust_remote_code, encoder_decoder=classifies)
    if classifies:
        check_classifier_exists(config, key, path)
    if of_encoders and not is_encoder(config):
        raise UserError(
            f"{key}: {path} ({config.model_type}) is no encoder, and a decoder reads the passage without what follows; name an "
            "encoder (BERT-like), or train the decoder to write answers with the sft stage."
        )
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs)
    check_tokenizer(path, tokenizer, key)
    check_files(
        auto,
        path,
        key,
        config,
        tokenizer,
        new_head=True,
        attn_implementation=recipe.attn_implementation,
        trained_by=recipe,
    )
    set_right_padding(tokenizer)
    return HeadInputs(config, is_encoder(config), tokenizer)


def check_has_head(auto: Any, path: str, config: PretrainedConfig) -> None:
    """Check that transformers puts this head on this kind of model.

    Raises:
        UserError: it does not.
    """
    if not (has_auto_class(auto, config) or getattr(config, "auto_map", None)):
        raise UserError(
            f"model_name_or_path: {path} ({config.model_type}): this stage has no {auto.__name__.removeprefix('Auto')} of it; name "
            "an encoder (BERT-like)."
        )
