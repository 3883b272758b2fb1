"""A randomly initialized model from a configuration, and a tokenizer trained on the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast, set_seed

from align.compat.transformers import has_causal_lm
from align.data.rows import Demonstration, render_text
from align.errors import UserError, nearest
from align.models.config_sizes import check_sizes
from align.models.context_length import max_positions
from align.models.load import language_model_class
from align.models.model_types import is_encoder_decoder
from align.models.tokenizer import read_chat_template

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]


def scratch_config(model_config: Mapping[str, Any], tokenizer_vocab_size: int) -> PretrainedConfig:
    """The configuration of a model to train from scratch; its vocabulary comes from its tokenizer later.

    Raises:
        UserError: an unknown architecture or key, or an invalid configuration.
    """
    given = dict(model_config)
    model_type = given.pop("model_type")
    check_sizes(given, "model_config")
    try:
        known = AutoConfig.for_model(model_type)
        known_keys = {*known.to_dict(), *known.attribute_map} - {
            "vocab_size",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        }
        for name in given:
            if name not in known_keys:
                raise UserError(f"model_config: {model_type} has no key {name!r} to set{nearest(name, known_keys)}")
        config: PretrainedConfig = AutoConfig.for_model(model_type, **given)
        config.pad_token_id, config.bos_token_id, config.eos_token_id = range(len(SPECIAL_TOKENS))
        if is_encoder_decoder(config):
            config.decoder_start_token_id = SPECIAL_TOKENS.index("<pad>")  # as T5's
        elif not has_causal_lm(config):
            raise KeyError(model_type)
        with torch.device("meta"):
            language_model_class(config).from_config(config)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"model_config: {model_type} is no language model; use llama or gpt2, or t5.") from error
    except Exception as error:  # of a model that cannot be built
        message = " ".join(str(error).split())[:300]
        raise UserError(f"model_config: transformers cannot make this {model_type}: {message}") from error
    if tokenizer_vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(
            f"tokenizer_vocab_size: expected at least {256 + len(SPECIAL_TOKENS)} (all bytes and "
            f"{', '.join(SPECIAL_TOKENS)}), got {tokenizer_vocab_size}."
        )
    return config


def write_scratch_model(
    config: PretrainedConfig,
    rows: Sequence[Demonstration],
    folder: Path,
    *,
    tokenizer_vocab_size: int,
    chat_template_path: str | None,
    seed: int,
) -> None:
    """Write a randomly initialized model, and a tokenizer trained on the rows, as a Hugging Face folder."""
    tokenizer = train_tokenizer(
        [render_text(turns) for row in rows for turns in (row.prompt, row.completion)],
        tokenizer_vocab_size,
        pairs=is_encoder_decoder(config),
    )
    tokenizer.model_max_length = max_positions(config) or tokenizer.model_max_length
    if chat_template_path is not None:
        tokenizer.chat_template = read_chat_template(chat_template_path)
    config.vocab_size = len(tokenizer)
    set_seed(seed)
    language_model_class(config).from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Sequence[str], size: int, pairs: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens; it encodes any text.

    Args:
        pairs: for an encoder-decoder: a text ends with </s>, instead of beginning with <s>.
    """
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    single, pair = (f"$A {eos}", f"$A {eos} $B {eos}") if pairs else (f"{bos} $A", f"{bos} $A $B")
    added = eos if pairs else bos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(added, tokenizer.token_to_id(added))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
