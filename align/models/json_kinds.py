"""Kinds of values in the JSON files of a model folder: a predicate, and its description in errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LARGEST_ID = 2**31 - 1  # of a token; the tokenizers library has ids of 32 bits
Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38  # neither NaN nor infinite


def is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_ID


def is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def one_or_list(check: Check) -> Check:
    return lambda value: check(value) or list_of(check)(value)


def _no_id(value: Any) -> bool:
    return type(value) is int and value == -1  # some models have it where they have no such token


def is_chat_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(each, dict) and is_text(each.get("name")) and is_text(each.get("template")) for each in value
        )
    return isinstance(value, str) or (isinstance(value, dict) and all(map(is_text, value.values())))


def is_added_tokens(value: Any) -> bool:
    return isinstance(value, dict) and all(
        index.isascii() and index.isdigit() and int(index[:20]) <= LARGEST_ID and is_token(token) and is_mapping(token)
        for index, token in value.items()
    )


NUMBER, WHOLE, FLAG, TEXT, MAPPING = (
    (is_number, "a number"),
    (is_whole, "a whole number"),
    (is_flag, "true or false"),
    (is_text, "text"),
    (is_mapping, "a mapping"),
)
FLAG_OR_TEXT = (lambda value: is_flag(value) or is_text(value), "true, false or text")
ID_OR_NONE = (
    lambda value: _no_id(value) or one_or_list(is_token_id)(value),
    "a token id or a list of token ids",
)
ONE_ID_OR_NONE = (lambda value: _no_id(value) or is_token_id(value), "a token id")
IDS = (list_of(is_token_id), "a list of token ids")
TOKEN = (is_token, "text, or a mapping with the text `content`")
TOKENS = (list_of(is_token), "a list of texts")
Rule = tuple[Check, str]
