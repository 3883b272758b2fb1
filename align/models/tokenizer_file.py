"""Split text into tokens as `tokenizer.json` defines it, also where transformers 5 does not follow the file.

From version 5 on, many of transformers' classes build normalizer, splits and BPE's options anew instead of reading them from the
file: Qwen2's for all models of type qwen2, GPT-2's for those that name it, whatever the file says. Digits, contractions, line
breaks or accents then become other tokens than in pre-training, or all words if the file is of SentencePiece's kind, without an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.terminal import say

# Where tokenizers differ: digits, contractions, line breaks, runs of spaces and signs, accents of two characters.
PROBE = "In 2024, 1234567 people DIDN'T say it's\n\n  so;;; \r\n\tx=y!!!\u3000cafe\u0301 \u4f60\u597d"
# A key of transformers for Mistral's newer tokenizers, whose tokenizer.json was written with splits that are not Mistral's.
MISTRAL = "fix_mistral_regex"
BPE_OPTIONS = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")


def has_tokens_of_class(tokenizer: PreTrainedTokenizerBase, path: str) -> bool:
    """Whether transformers' class for the model's type has added special tokens that the files lack, and the model has no embedding for.

    Qwen2's adds <|endoftext|> to a tokenizer of the user's own.
    """
    ours: Any = getattr(tokenizer, "backend_tokenizer", None)
    if ours is None or not isinstance(ours.model, models.BPE) or (file := _file(path)) is None:
        return False
    config, settings = (file.with_name(name) for name in ("config.json", "tokenizer_config.json"))
    size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
    if not isinstance(size, int) or len(tokenizer) <= size:
        return False
    theirs = Tokenizer.from_file(str(file))
    named = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    return any(theirs.token_to_id(token) is None and token not in named for token in tokenizer.all_special_tokens)


def split_as_in_file(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Make a BPE tokenizer split text as the `tokenizer.json` in `path`, if that or the class is byte-level. In place.

    Others are left as transformers makes them, which in SentencePiece-type classes has always set these parts from
    tokenizer_config.json: where ids differ from the file's, that is said.
    """
    ours: Any = getattr(tokenizer, "backend_tokenizer", None)
    if ours is None or (file := _file(path)) is None or getattr(ours, MISTRAL, False):
        return  # that key of tokenizer_config.json asks for other splits than the file's
    if getattr(ours, MISTRAL, None) is False and tokenizer.init_kwargs.get(MISTRAL) is None and _is_byte_level(ours):
        _say_whether_splits_are_mistrals(ours, path)
    theirs = Tokenizer.from_file(str(file))
    if not isinstance(theirs.model, models.BPE) or not isinstance(ours.model, models.BPE):
        return
    if _parts(ours) == _parts(theirs):
        return
    name, spaced = type(tokenizer).__name__, tokenizer.init_kwargs.get("add_prefix_space")
    differ = _ids(ours) != _ids(theirs)
    if not (_is_byte_level(ours) or _is_byte_level(theirs)):
        if differ and spaced is None:
            _note(
                f"{path}: the {name} that transformers 5 makes of its tokenizer.json gives other ids than the file; these are used. If "
                "the model was trained on the file's, set tokenizer_class: PreTrainedTokenizerFast in its tokenizer_config.json"
            )
        return
    if _options(ours) != _options(theirs):
        ours.model = theirs.model
    ours.normalizer, ours.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    ours.decoder = theirs.decoder or ours.decoder
    if spaced is not None and isinstance(ours.pre_tokenizer, pre_tokenizers.ByteLevel):
        ours.pre_tokenizer.add_prefix_space = spaced  # of tokenizer_config.json, which wins in transformers 4 too
    if differ:
        _note(
            f"{path}: text is split into tokens as its tokenizer.json says; the {name} that transformers 5 makes of it would give other "
            "ids, which the model was not trained on"
        )


def _say_whether_splits_are_mistrals(ours: Tokenizer, path: str) -> None:
    fixed: Any = AutoTokenizer.from_pretrained(path, **{MISTRAL: True})
    if ours.token_to_id("[INST]") is not None and _ids(fixed.backend_tokenizer) != _ids(ours):
        _note(
            f"{path}: its tokenizer.json splits text otherwise than Mistral's own tokenizer, on which the model was trained, and its ids "
            f"are used; set {MISTRAL}: true in its tokenizer_config.json for those of Mistral, false if the model was trained on the file's"
        )


def _ids(tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(PROBE, add_special_tokens=False).ids
    return ids


def _note(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"note: {text}")


def _file(path: str) -> Path | None:
    if os.path.isdir(path):
        file = Path(path) / "tokenizer.json"
        return file if file.is_file() else None
    cached = try_to_load_from_cache(path, "tokenizer.json")
    return Path(cached) if isinstance(cached, str) else None


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    content = _state(tokenizer.pre_tokenizer) or {"type": None}
    return "ByteLevel" in [part["type"] for part in content.get("pretokenizers", [content])]


def _parts(tokenizer: Tokenizer) -> list[Any]:
    return [_state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer), _options(tokenizer)]


def _options(tokenizer: Tokenizer) -> list[Any]:
    return [getattr(tokenizer.model, name) for name in BPE_OPTIONS]


def _state(part: Any) -> Any:
    """A part of a tokenizer as in JSON, without what only offsets depend on."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(each) for name, each in value.items() if name != "trim_offsets"}
        return [kept(each) for each in value] if isinstance(value, list) else value

    return None if part is None else kept(json.loads(part.__getstate__()))
