"""Kinds of models, by the types of transformers: encoders, sequence-to-sequence models, and those that no stage supports."""

from __future__ import annotations

from transformers import PretrainedConfig

from align.compat.transformers import causal_lm_types, seq2seq_lm_types
from align.errors import UserError


def is_sequence_to_sequence(config: PretrainedConfig) -> bool:
    """Whether the model is an encoder-decoder (T5-like), or one half of such a model."""
    only = config.model_type in seq2seq_lm_types()
    return getattr(config, "is_encoder_decoder", False) or (only and config.model_type not in causal_lm_types())


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Whether the model is an encoder-decoder of which transformers has a language model (T5, BART, ...)."""
    return bool(getattr(config, "is_encoder_decoder", False)) and config.model_type in seq2seq_lm_types()


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the backbone is an encoder (BERT-like): bidirectional, and unable to generate."""
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    return config.model_type not in causal_lm_types() or config.model_type in ENCODER_TYPES


# Encoders that transformers also lists as causal models, for use with `is_decoder`.
ENCODER_TYPES = {"bert", "roberta", "electra", "camembert", "xlm-roberta", "xlm-roberta-xl", "rembert", "big_bird",
                 "megatron-bert", "bert-generation", "data2vec-text", "ernie", "roformer",
                 "roberta-prelayernorm", "xmod"}  # fmt: skip


# Listed as causal models too. XLNet predicts tokens in any order, and reads padding; XLM and Reformer take other inputs; CPM-Ant
# takes no mask, and tells padding by its ids.
UNSUPPORTED_TYPES = {"xlnet", "xlm", "reformer", "cpmant"}

ENCODER_DECODER_STAGES = "sft, mlm, classify, reward, evaluate"


def check_kind(config: PretrainedConfig, key: str, path: str, *, encoder_decoder: bool) -> None:
    """Check that a stage takes models of this kind.

    Args:
        key: the recipe key that names the model, for errors.
        encoder_decoder: whether it takes an encoder-decoder there.

    Raises:
        UserError: it does not.
    """
    if is_encoder_decoder(config):
        if not encoder_decoder:
            raise UserError(
                f"{key}: {path} is an encoder-decoder ({config.model_type}), which cannot stand here: {ENCODER_DECODER_STAGES} "
                "take it; name a causal decoder (llama- or GPT-like)."
            )
    elif is_sequence_to_sequence(config):
        raise UserError(
            f"{key}: {path} is a sequence-to-sequence model of a kind ({config.model_type}) that no stage trains, or half of one; "
            f"name a whole encoder-decoder that reads text (T5- or BART-like: {ENCODER_DECODER_STAGES}), a causal decoder "
            "(llama- or GPT-like: sft, reward, ppo, classify) or an encoder (BERT-like: mlm, classify, reward)."
        )
    if config.model_type in UNSUPPORTED_TYPES:
        raise UserError(
            f"{key}: {path}: no stage supports models of type {config.model_type}; name another causal decoder."
        )
    if hasattr(config, "default_language") and config.default_language not in config.languages:  # X-MOD
        raise UserError(
            f"{key}: {path}: its config.json gives {config.default_language!r} as default_language, and a model of type "
            f"{config.model_type} has layers for each language: set default_language to that of the rows, one of "
            f"{', '.join(config.languages)}."
        )
    composite = "text_config" in getattr(config, "sub_configs", {}) and not getattr(config, "auto_map", None)
    if composite and config.model_type not in causal_lm_types():
        raise UserError(
            f"{key}: {path} is a model of text and images ({config.model_type}), of which transformers has no language model; "
            "name a text model, such as its language model saved in a folder of its own."
        )
