"""The keys of a recipe as `--help` prints them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import textwrap
from typing import Any, get_type_hints

from align.config.convert import type_name
from align.config.data_source import DataSource


def describe_keys(cls: type[Any]) -> str:
    """A recipe's docstring and every key with its type, default and meaning, wrapped to the terminal."""
    head = [
        *_wrapped(inspect.cleandoc(cls.__doc__ or ""), ""),
        "",
        *_wrapped("Each key can be set in the YAML recipe or given as --key value (--mapping.name value).", ""),
        "",
    ]
    source = ["", "keys of a data source:", *_keys(DataSource, "")]
    return "\n".join([*head, "keys:", *_keys(cls, "--"), *source]) + "\n"


def _keys(cls: type[Any], prefix: str) -> list[str]:
    annotations = get_type_hints(cls)
    lines = []
    for field in dataclasses.fields(cls):
        if field.metadata.get("required"):
            default = "required"
        elif field.default is not dataclasses.MISSING:
            default = f"default {json.dumps(field.default)}"
        else:
            default = "default empty"
        lines += _wrapped(f"{prefix}{field.name}  <{_type(field, annotations[field.name])}>  {default}", "  ")
        lines += _wrapped(field.metadata["help"], "        ")
    return lines


def _type(field: dataclasses.Field[Any], annotation: Any) -> str:
    return field.metadata.get("type_name") or type_name(annotation)


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    paragraphs = [
        textwrap.wrap(each, width, initial_indent=indent, subsequent_indent=indent) for each in text.split("\n\n")
    ]
    return [line for index, lines in enumerate(paragraphs) for line in ([""] * (index > 0) + lines)]
