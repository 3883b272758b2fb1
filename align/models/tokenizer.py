"""Tokenizers: loading, the chat template, the padding token, and the tokens that end a response of the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from align.compat.transformers import COUNT_FROM_PADDING, write_unchecked
from align.config.text_file import read_text
from align.data.chat_template import check_chat_template, set_template_kwargs
from align.data.end_tokens import end_ids, set_model_ends
from align.data.turn_end import add_template_end
from align.errors import TemplateFailure, UserError, reason
from align.models.inspect_folder import read_object
from align.models.json_kinds import LARGEST_ID
from align.models.load import adapter_settings
from align.models.small_files import check_small_file, has_vocabulary
from align.models.tokenizer_file import has_tokens_of_class, split_as_in_file


def load_tokenizer(
    path: str,
    chat_template_path: str | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`, with left padding, a padding token, the given chat template, and the model's end tokens.

    Raises:
        UserError: no tokenizer in `path`, no end-of-text token, `eos_token_id` of the model that is no token id, or an
            unreadable chat template, or one that does not read one of `chat_template_kwargs`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code)
        if has_tokens_of_class(tokenizer, path):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, padding_side="left")
    except Exception as error:  # the tokenizers library raises nothing more special
        if os.path.isdir(path) and not has_vocabulary(path):
            base = (adapter_settings(path) or {}).get("base_model_name_or_path")
            source = f"its base {base}" if base else "the model that it was trained from"
            raise UserError(
                f"{path}: has no tokenizer; copy tokenizer.json, tokenizer_config.json and their like there from {source}."
            ) from error
        file = _check_tokenizer_json(path)
        raise UserError(f"{file}: the tokenizer cannot be loaded. {reason(error)}") from error
    split_as_in_file(tokenizer, path)
    for setting in (
        "is_local",
        "local_files_only",
    ):  # it was loaded; saved with it, they would tell a start offline from others
        tokenizer.init_kwargs.pop(setting, None)
    end = tokenizer.eos_token or tokenizer.sep_token  # an encoder's rows end with the separator
    if end is None:
        raise UserError(
            f"{path}: the tokenizer has no end-of-text token; set `eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = end  # safe: masks say what is padding, never ids
    if chat_template_path is not None:
        tokenizer.chat_template = read_chat_template(chat_template_path)
        tokenizer.chat_template_path = chat_template_path  # for errors of the template
    set_template_kwargs(tokenizer, chat_template_kwargs or {})
    if tokenizer.eos_token is not None:
        set_model_ends(tokenizer, model_end_ids(path, trust_remote_code))
        add_template_end(tokenizer)
    return tokenizer


def model_end_ids(path: str, trust_remote_code: bool = False) -> list[int]:
    """`eos_token_id` of the model's generation config, or of its config when it has none, as transformers reads them.

    Raises:
        UserError: it is neither a token id nor a list of them, or transformers refuses the generation config.
    """
    settings = adapter_settings(path)
    folder = path if settings is None else str(settings["base_model_name_or_path"])
    file = "generation_config.json"
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # it has none
        file = "config.json"
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception:  # a tokenizer alone; what loads the model says what is wrong with its configuration
            return []
        found = GenerationConfig.from_model_config(config).eos_token_id
    except Exception as error:  # whatever it raises for what the file holds
        key = _refused_key(Path(folder) / file)
        raise UserError(f"{folder}/{file}: {key}transformers refuses it; correct the file. {reason(error)}") from error
    ids = [] if found == -1 else _as_list(found)
    if any(type(token) is not int or not 0 <= token <= LARGEST_ID for token in ids):
        raise UserError(f"{folder}/{file}: eos_token_id: expected a token id or a list of token ids, got {found!r}.")
    return ids


def keep_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Write all end tokens of the tokenizer into the model's generation config, so that the saved model stops at them."""
    config = model.generation_config
    if config is not None and not {*end_ids(tokenizer)[1:]} <= {*_as_list(config.eos_token_id)}:
        config.eos_token_id = [*end_ids(tokenizer)]
        write_unchecked(config)
    return model


def _check_tokenizer_json(path: str) -> str:
    """The file that a tokenizer in a folder, which cannot be loaded, is at fault by: `tokenizer.json` or the folder.

    Raises:
        UserError: a key of `tokenizer.json` has a value of another type.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return path
    # Only now: that of a large vocabulary takes half a second to parse.
    check_small_file(file, read_object(file, "tokenizer"), "tokenizer")
    try:
        Tokenizer.from_file(str(file))
    except Exception:  # the tokenizers library raises nothing more special
        return str(file)
    return path


def _refused_key(file: Path) -> str:
    """The first key of a generation config that transformers refuses by itself, as `key: `; empty if there is none."""
    if not file.is_file():
        return ""
    for name, value in read_object(file, "generation").items():
        try:
            GenerationConfig.from_dict({name: value})
        except Exception:  # as above
            return f"{name}: "
    return ""


def read_chat_template(path: str) -> str:
    """The chat template in a file.

    Raises:
        UserError: it cannot be read, or is no Jinja template.
    """
    text = read_text(path, "chat_template_path")
    try:
        check_chat_template(text)
    except TemplateFailure as error:
        raise UserError(f"chat_template_path: {path} {error}") from error
    return text


def _as_list(ids: Any) -> list[Any]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def saved_pad_id(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, scores: bool = False) -> int | None:
    """`pad_token_id` of the configuration of a saved model: the tokenizer's; but the model's own, `config`'s, in two cases.

    The model counts positions from it (RoBERTa's kind), or the tokenizer's is an end token, in place of one that it lacks.

    Args:
        scores: whether transformers needs the tokenizer's, to find the token that is scored.
    """
    text = config.get_text_config()
    pad = tokenizer.pad_token_id
    stands_in = not scores and pad in (tokenizer.eos_token_id, tokenizer.sep_token_id)
    own: int | None = getattr(text, "pad_token_id", None)
    if own is not None and own < 0:
        return int(pad)  # as Llama 2's -1, which is no token
    return own if stands_in or text.model_type in COUNT_FROM_PADDING else int(pad)


def set_right_padding(tokenizer: PreTrainedTokenizerBase) -> None:
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
