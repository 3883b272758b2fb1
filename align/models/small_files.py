"""Validate the small JSON files of a model folder, key by key, before a library reads them.

transformers takes over any value of most keys, and fails much later, or saves it with the model that was trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.convert import shown
from align.errors import UserError
from align.models.json_kinds import (
    FLAG,
    FLAG_OR_TEXT,
    ID_OR_NONE,
    IDS,
    MAPPING,
    NUMBER,
    ONE_ID_OR_NONE,
    TEXT,
    TOKEN,
    TOKENS,
    WHOLE,
    Rule,
    is_added_tokens,
    is_chat_template,
    is_mapping,
    is_number,
    is_text,
    is_token,
    is_token_id,
    list_of,
    one_or_list,
)

JSON_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What a key may hold beside null, which stands for its default. Other keys are the business of a model's own code.
GENERATION: Mapping[str, Rule] = {
    "eos_token_id": (one_or_list(is_token_id), "a token id or a list of token ids"),
    "pad_token_id": ONE_ID_OR_NONE,
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), ID_OR_NONE),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), ID_OR_NONE),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), IDS),
    **dict.fromkeys(("bad_words_ids", "force_words_ids"), (lambda value: isinstance(value, list), "a list")),
    **dict.fromkeys(
        [
            "max_length",
            "max_new_tokens",
            "min_length",
            "min_new_tokens",
            "num_beams",
            "max_cache_len",
            "top_k",
            "no_repeat_ngram_size",
            "num_return_sequences",
            "encoder_no_repeat_ngram_size",
            "num_assistant_tokens",
            "prompt_lookup_num_tokens",
            "max_matching_ngram_size",
            "num_beam_groups",
            "assistant_early_exit",
            "assistant_lookbehind",
            "target_lookbehind",
            "prefill_chunk_size",
        ],
        WHOLE,
    ),
    **dict.fromkeys(
        [
            "max_time",
            "temperature",
            "top_p",
            "min_p",
            "top_h",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
            "repetition_penalty",
            "encoder_repetition_penalty",
            "length_penalty",
            "guidance_scale",
            "assistant_confidence_threshold",
            "assistant_ensemble_weight",
            "penalty_alpha",
            "diversity_penalty",
        ],
        NUMBER,
    ),
    **dict.fromkeys(
        [
            "do_sample",
            "use_cache",
            "renormalize_logits",
            "remove_invalid_values",
            "token_healing",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "output_logits",
            "return_dict_in_generate",
            "disable_compile",
            "low_memory",
            "is_assistant",
            "use_mtp",
            "_from_model_config",
        ],
        FLAG,
    ),
    "early_stopping": FLAG_OR_TEXT,
    "stop_strings": (one_or_list(is_text), "text or a list of texts"),
    **dict.fromkeys(("cache_implementation", "num_assistant_tokens_schedule", "transformers_version"), TEXT),
    **dict.fromkeys(("cache_config", "compile_config", "watermarking_config"), MAPPING),
    "sequence_bias": (lambda value: isinstance(value, list | dict), "a list or a mapping"),
    "exponential_decay_length_penalty": (list_of(is_number), "a list of numbers"),
}
SPECIAL_TOKENS: Mapping[str, Rule] = {
    **{f"{name}_token": TOKEN for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")},
    "additional_special_tokens": TOKENS,
    "extra_special_tokens": (
        lambda value: list_of(is_token)(value) or (isinstance(value, dict) and all(map(is_token, value.values()))),
        "a mapping or a list of texts",
    ),
}
TYPED_TOKEN: Rule = (
    lambda value: is_token(value) and (is_text(value) or value.get("__type") == "AddedToken"),
    "text, or a mapping with `content` and `__type: AddedToken`",
)
SIDE: Rule = (lambda value: value in ("left", "right"), "left or right")
TOKENIZER: Mapping[str, Rule] = {
    **{name: TYPED_TOKEN if rule is TOKEN else rule for name, rule in SPECIAL_TOKENS.items()},
    "model_max_length": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "chat_template": (is_chat_template, "text, or templates by name"),
    "added_tokens_decoder": (is_added_tokens, "tokens, mappings with the text `content`, by their ids"),
    **dict.fromkeys(("padding_side", "truncation_side"), SIDE),
    **dict.fromkeys(("tokenizer_class", "name_or_path", "backend", "processor_class", "errors"), TEXT),
    **dict.fromkeys(
        [
            "add_bos_token",
            "add_eos_token",
            "add_prefix_space",
            "clean_up_tokenization_spaces",
            "split_special_tokens",
            "legacy",
            "do_lower_case",
            "from_slow",
            "use_default_system_prompt",
            "spaces_between_special_tokens",
            "is_local",
        ],
        FLAG,
    ),
    **dict.fromkeys(("sp_model_kwargs", "auto_map"), MAPPING),
    "model_input_names": (list_of(is_text), "a list of texts"),
    "init_inputs": (lambda value: isinstance(value, list), "a list"),
}
OBJECT: Rule = (is_mapping, "a JSON object")
TOKENIZER_JSON: Mapping[str, Rule] = {
    "version": TEXT,
    "added_tokens": (
        lambda value: list_of(lambda each: is_mapping(each) and is_text(each.get("content")))(value),
        "a list of tokens with ids and the text `content`",
    ),
    **dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"), OBJECT
    ),
}
RULES: Mapping[str, Mapping[str, Rule]] = {
    "tokenizer.json": TOKENIZER_JSON,
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER,
    "special_tokens_map.json": SPECIAL_TOKENS,
    "config.json": {
        "eos_token_id": ID_OR_NONE,
        **dict.fromkeys(("bos_token_id", "pad_token_id"), ONE_ID_OR_NONE),
    },
}


def check_small_file(path: Path, content: Mapping[str, Any], key: str) -> None:
    """Check the values in one of the JSON files of a model folder.

    Args:
        content: of the file.
        key: the recipe key that names the model, for errors.

    Raises:
        UserError: a value is of another type, or out of range; names file and key.
    """
    if path.name == "added_tokens.json":
        rules: Mapping[str, Rule] = dict.fromkeys(content, (is_token_id, "a token id"))
    else:
        rules = RULES.get(path.name, {})
    for name, value in content.items():
        if name not in rules or (value is None and path.name != "added_tokens.json"):
            continue
        fits, expected = rules[name]
        if not fits(value):
            raise UserError(
                f"{key}: {path}: {name}: expected {expected}, got {shown(value)}; correct the file, or copy the model's own."
            )


def has_vocabulary(folder: str) -> bool:
    """Whether a folder has a file that may hold a tokenizer's vocabulary."""
    return any(
        name.startswith(("tokenizer.", "vocab", "spiece", "sentencepiece", "merges", "tekken", "bpe"))
        or name.endswith((".tiktoken", ".model"))
        for name in os.listdir(folder)
    )
