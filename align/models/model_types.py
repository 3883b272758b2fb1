"""Kinds of models, by the types of transformers: encoders, sequence-to-sequence models, and those that no stage supports."""

from __future__ import annotations

from transformers import PretrainedConfig

from align.compat.transformers import causal_lm_types, seq2seq_lm_types


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
