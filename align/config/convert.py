"""Fill a dataclass from a mapping, strictly: an error names what was expected.

Types come from the annotations: a bool is not an integer, an integer is a number, and text such as `1e-5`, which YAML
does not parse as a number, is one where a number is expected. Nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from align.config.data_source import DataSource
from align.errors import UserError, nearest

T = TypeVar("T")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "anything"}
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
        UserError: an unknown or missing key, or a value of another type.
    """
    annotations = get_type_hints(cls)
    for name in given:
        if name not in annotations:
            raise UserError(f"{where(str(name))}: unknown key{explain(str(name)) or nearest(str(name), annotations)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass, which typing cannot express
        if field.name not in given and field.metadata.get("required"):
            raise UserError(f"{where(field.name)}: missing; it is required: {field.metadata['help']}")
    return cls(**{name: convert(value, annotations[name], where(name)) for name, value in given.items()})


def convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` asks, or a UserError that begins with `where`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        if value is None:
            return None
        (annotation,) = (arg for arg in args if arg is not NoneType)
        if isinstance(value, str) and value.lower() == "none" and get_origin(annotation) is not Literal:
            raise UserError(f"{where}: expected {type_name(annotation)}, got {value!r}; for nothing, write null.")
        return convert(value, annotation, where)
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(f"{where}: expected one of {', '.join(args)}, got {_shown(value)}{nearest(str(value), args)}")
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
        raise UserError(f"{where}: expected a mapping of names to values, got {_shown(value)}")
    if annotation is DataSource:
        return _data_source(value, where)
    return value if annotation is Any else _scalar(value, annotation, where)


def _data_source(value: Any, where: str) -> DataSource:
    if isinstance(value, DataSource):  # from Python
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, str | os.PathLike):
        return DataSource(path=os.fspath(value))
    if isinstance(value, dict):
        return build(DataSource, value, lambda name: f"{where}.{name}")
    raise UserError(f"{where}: expected a path, a hub id or a mapping with `path` or `generator`, got {_shown(value)}")


def _scalar(value: Any, annotation: Any, where: str) -> Any:
    if annotation is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is annotation:
        return value
    elif annotation is str and isinstance(value, os.PathLike):  # from Python
        return os.fspath(value)
    hint = ""
    if value is None:
        hint = "; leave the key out to use its default"
    elif annotation is str and isinstance(value, bool | int | float):
        hint = "; put it in quotes"
    elif annotation is bool and str(value).lower() in ("true", "false"):
        hint = f"; write {str(value).lower()} without quotes"
    elif annotation is int and (whole := _whole(value)) is not None:
        hint = f"; write {whole}"
    raise UserError(f"{where}: expected {_NAMES[annotation]}, got {_shown(value)}{hint}")


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
        raise UserError(f"{where}: expected names as keys, got {_shown(key)}; put it in quotes")
    return key


def _shown(value: Any) -> str:
    """A value and its kind, as YAML would write it."""
    if value is None:
        return "nothing (null)"
    return f"{json.dumps(value, default=str, ensure_ascii=False)} ({kind(value)})"


def kind(value: Any) -> str:
    """What a value from a YAML or JSON file is, in words with their article."""
    kinds = {
        NoneType: "null",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return kinds.get(type(value), type(value).__name__)
