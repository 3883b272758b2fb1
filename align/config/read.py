"""From a YAML file and command-line overrides to plain values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import glob
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from align.config.convert import kind
from align.config.data_source import DataSource
from align.config.text_file import read_text
from align.errors import UserError, nearest

MAX_BYTES = 2**20  # of a recipe
MAX_VALUES = 20_000  # of a recipe, with every alias written out
MAX_NUMBER = 100  # characters of a number
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in lines:
                first = lines[str(key.value)]
                raise UserError(f"{self.name}:{line}: {key.value}: written twice, first in line {first}; keep one.")
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """The value that YAML text stands for, and its root node.

    Args:
        name: of the file, for errors.

    Raises:
        UserError: a key that is written twice, or anything besides text, numbers, lists and mappings; a number, or
            aliases, of absurd size.
        yaml.YAMLError: not YAML, or nested too deeply.
    """
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None, None
        _count_values(node, name, "", {})
        return loader.construct_document(node), node
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or an alias contains itself") from None
    except (ValueError, LookupError) as error:  # a value that is not what its tag says, such as `!!int x`
        raise yaml.YAMLError(f"it holds a value that cannot be read ({error})") from None


def _count_values(node: yaml.Node, name: str, key: str, counts: dict[int, int]) -> int:
    """The number of values below a node, with every alias written out; checks what each of them is.

    Args:
        key: in which the node lies, for errors.
    """
    if id(node) in counts:
        return counts[id(node)]
    where = f"{name}:{node.start_mark.line + 1}" + f": {key[:MAX_NUMBER]}" * bool(key)
    if node.tag not in _PLAIN_TAGS:
        kind_text = {"timestamp": "a date", "binary": "binary data", "set": "a set"}.get(
            node.tag.removeprefix(_TAG), node.tag
        )
        raise UserError(f"{where}: expected text, numbers, lists or mappings, got {kind_text}; put text in quotes.")
    total = 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > MAX_NUMBER:
            raise UserError(f"{where}: expected a number, got one of {len(node.value)} digits; put text in quotes.")
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(child, name, key, counts) for child in node.value)
    else:
        for child, value in node.value:
            inner = ".".join(filter(None, (key, str(child.value)))) if isinstance(child, yaml.ScalarNode) else key
            total += _count_values(child, name, key, counts) + _count_values(value, name, inner, counts)
    if total > MAX_VALUES:
        raise UserError(
            f"{where}: expands to more than {MAX_VALUES:,} values; a recipe is not a data file, shorten it."
        )
    counts[id(node)] = total
    return total


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of each of its keys.

    Raises:
        UserError: no such file, it cannot be read, or it holds something other than a mapping.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: expected a recipe file, got a folder; `align run {path}` runs its numbered recipes.")
    if not os.path.lexists(path):
        there = sorted(glob(os.path.join(os.path.dirname(path) or ".", "*.y*ml")))
        raise UserError(f"{path}: no such recipe{nearest(path, map(os.path.normpath, there))}")
    try:
        values, node = parse_yaml(read_text(path, max_bytes=MAX_BYTES), path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{place}: not readable as YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else kind(values)
        raise UserError(f"{path}: expected lines of `key: value`, got {got}")
    assert isinstance(node, yaml.MappingNode)
    return values, {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], annotations: dict[str, Any]) -> set[str]:
    """Write command-line overrides into `values`; returns the keys they change.

    Args:
        annotations: the type of each key.

    Raises:
        UserError: a word that is no `--key` nor the value of one, or a part of something that is no mapping.
    """
    words: list[tuple[str, list[str]]] = []
    for word in overrides:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            words.append((name.replace("-", "_"), [value] if equals else []))
        elif words:
            words[-1][1].append(word)
        else:
            raise UserError(f"{word}: expected `--key value` after the recipe, got this word alone")
    for dotted, tokens in words:
        top, *inner = dotted.split(".")
        if inner:
            _descend(values, [top, *inner[:-1]], annotations)[inner[-1]] = _parse(tokens, Any, dotted)
        else:
            values[top] = _parse(tokens, annotations.get(top, Any), top)
    return {dotted.split(".")[0] for dotted, _ in words}


def _descend(values: dict[str, Any], names: list[str], annotations: dict[str, Any]) -> dict[str, Any]:
    for depth, name in enumerate(names, start=1):
        inner = values.get(name) or {}
        if isinstance(inner, list) and len(inner) == 1:
            (inner,) = inner
        if isinstance(inner, str) and annotations.get(name) == list[DataSource]:
            inner = {"path": inner}
        if not isinstance(inner, dict):
            raise UserError(
                f"--{'.'.join(names[:depth])}: expected one mapping to change a part of, got {inner!r}; give all of it"
            )
        values[name] = inner
        values = inner
    return values


def _parse(tokens: list[str], annotation: Any, name: str) -> Any:
    """Parse the words after `--name` for a key of this type; `align.config.convert` checks the value."""
    kinds = get_args(annotation) if NoneType in get_args(annotation) else (annotation,)
    if not tokens and bool in kinds:
        return True
    if len(tokens) > 1 and get_origin(annotation) is list:
        return [_parse([token], get_args(annotation)[0], name) for token in tokens]
    if len(tokens) != 1:
        raise UserError(
            f"--{name}: expected one value, got {' '.join(tokens) or 'none'}; quote a value that has spaces"
        )
    takes_text = any(kind in (str, list[str], DataSource) or get_origin(kind) is Literal for kind in kinds)
    try:
        parsed, _ = parse_yaml(tokens[0], f"--{name}")
    except yaml.YAMLError:
        return tokens[0]
    except UserError:
        if takes_text and not tokens[0].startswith(("[", "{")):  # a date, for one
            return tokens[0]
        raise
    return tokens[0] if takes_text and not isinstance(parsed, str | list | dict | None) else parsed
