"""Fill a dataclass from a mapping, strictly: an error names what was expected.

Types come from the annotations: a bool is not an integer, an integer is a number, and text such as `1e-5`, which YAML
does not parse as a number, is one where a number is expected. Nothing else is converted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from align.config.data_source import DataSource
from align.config.keys import range_errors
from align.errors import UserError, first_of, nearest

T = TypeVar("T")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "anything"}
LARGEST_INT = 2**63  # a whole number is below it; Python would not even print one of 4,301 digits
SHOWN = 200  # characters of a value that an error shows
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def type_name(annotation: Any) -> str:
    """An annotation in words, as `--help` and the errors print it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if arg is NoneType else type_name(arg) for arg in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is list:
        if args[0] is DataSource:
            return "data source or list of them"
        return f"list of {'mappings' if get_origin(args[0]) is dict else _PLURALS.get(args[0], type_name(args[0]))}"
    if origin is dict:
        return "mapping"
    return _NAMES.get(annotation, str(annotation))


def build(
    cls: type[T],
    given: Mapping[Any, Any],
    where: Callable[[str], str],
    explain: Callable[[str], str | None] = lambda name: None,
) -> T:
    """`cls(**given)` with every value checked against its annotation.

    Args:
        cls: a dataclass made with `align.config.keys.key` and `required`.
        where: key to its place in words, with which an error begins.
        explain: unknown key to what the user should do instead, or None for the nearest known key.

    Raises:
        UserError: unknown or missing keys, or values of another type; then numbers out of their range are among `others`.
    """
    annotations = get_type_hints(cls)
    wrong: list[UserError] = []
    for name in given:
        if name not in annotations:
            name = "null" if name is None else str(name)[:SHOWN]
            wrong.append(UserError(f"{where(name)}: unknown key{explain(name) or nearest(name, annotations)}"))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass, which typing cannot express
        if field.name not in given and field.metadata.get("required"):
            wrong.append(UserError(f"{where(field.name)}: missing; it is required: {field.metadata['help']}"))
    values: dict[str, Any] = {}
    for name in given:
        if name in annotations:
            try:
                values[name] = convert(given[name], annotations[name], where(name))
            except UserError as error:
                wrong.append(error)
    if wrong:
        raise first_of([*wrong, *range_errors(cls, values, where)])
    return cls(**values)


def convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` asks, or a UserError that begins with `where`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        if value is None:
            return None
        *others, annotation = (arg for arg in args if arg is not NoneType)
        for each in others:  # `bool | float | str`: the first that it is
            with contextlib.suppress(UserError):
                return convert(value, each, where)
        if get_origin(annotation) is dict and others and not isinstance(value, dict):
            words = [word for each in others for word in get_args(each)]
            raise UserError(
                f"{where}: expected {', '.join(words)} or a mapping, got {shown(value)}{nearest(str(value), words)}"
            )
        if isinstance(value, str) and value.lower() == "none" and get_origin(annotation) is not Literal:
            raise UserError(f"{where}: expected {type_name(annotation)}, got {value!r}; for nothing, write null.")
        return convert(value, annotation, where)
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(f"{where}: expected one of {', '.join(args)}, got {shown(value)}{nearest(str(value), args)}")
    if origin is list:
        if isinstance(value, list):
            return [convert(item, args[0], f"{where}[{index}]") for index, item in enumerate(value)]
        return [] if value is None else [convert(value, args[0], where)]
    if origin is dict:
        if isinstance(value, dict | NoneType):
            return {
                key_text(key) if args[0] is Any else _text(key, where): convert(item, args[1], f"{where}.{key}")
                for key, item in (value or {}).items()
            }
        raise UserError(f"{where}: expected a mapping of names to values, got {shown(value)}")
    if annotation is DataSource:
        return _data_source(value, where)
    return _json_value(value, where) if annotation is Any else _scalar(value, annotation, where)


def _json_value(value: Any, where: str) -> Any:
    """A value of any kind that `run.json` can hold."""
    if isinstance(value, list):
        return [_json_value(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {
            _clean(key, where) if isinstance(key, str) else key: _json_value(item, f"{where}.{key}")
            for key, item in value.items()
        }
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float | str):
        return _scalar(value, next(kind for kind in (int, float, str) if isinstance(value, kind)), where)
    raise UserError(f"{where}: expected text, numbers, lists or mappings, got {shown(value)}; put it in quotes")


def _data_source(value: Any, where: str) -> DataSource:
    if isinstance(value, DataSource):  # from Python
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, str | os.PathLike):
        return DataSource(path=_clean(os.fspath(value), where))
    if isinstance(value, dict):
        return build(DataSource, value, lambda name: f"{where}.{name}")
    raise UserError(f"{where}: expected a path, a hub id or a mapping with `path` or `generator`, got {shown(value)}")


def _scalar(value: Any, annotation: Any, where: str) -> Any:
    if annotation is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif annotation is str and isinstance(value, str | os.PathLike):  # a path from Python
        return _clean(os.fspath(value), where)
    elif type(value) is annotation and not (annotation is int and abs(value) >= LARGEST_INT):
        return value
    hint = ""
    if value is None:
        hint = "; leave the key out to use its default"
    elif annotation is str and isinstance(value, bool | int | float | datetime.date):
        hint = "; put it in quotes"
    elif annotation is bool and str(value).lower() in ("true", "false"):
        hint = f"; write {str(value).lower()} without quotes"
    elif annotation is int and (whole := _whole(value)) is not None:
        hint = f"; write {whole}"
    raise UserError(f"{where}: expected {_NAMES[annotation]}, got {shown(value)}{hint}")


def _clean(text: Any, where: str) -> str:
    """Text that can be written to a file and, as a path, given to the system."""
    if "\0" in text:
        raise UserError(f"{where}: expected text, got a null character in {shown(text)}; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: expected text, got {text[error.start]!a}, which is no character of its own, in {text[:SHOWN]!a}; leave it out"
        ) from None
    return str(text)


def _whole(value: Any) -> int | None:
    try:
        return int(float(value)) if float(value).is_integer() and not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None


def key_text(value: Any) -> str:
    """A class id as text, whichever way a file holds it: 1, 1.0 and "1" are `1`, true is `true`."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _text(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise UserError(f"{where}: expected names as keys, got {shown(key)}; put it in quotes")
    return _clean(key, where)


def shown(value: Any) -> str:
    """A value and its kind, as YAML would write it; a long one is cut."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        return f"one of {value.bit_length()} bits ({kind(value)})"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= SHOWN else text[:SHOWN] + ' ...'} ({kind(value)})"


def kind(value: Any) -> str:
    """The kind of a value from a YAML or JSON file, with its article."""
    kinds = {
        NoneType: "null",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
        datetime.date: "a date",
        datetime.datetime: "a date",
        bytes: "binary data",
        set: "a set",
    }
    return kinds.get(type(value), type(value).__name__)
