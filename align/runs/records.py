"""The records of a run, and the one reader of them: what each must hold, by key.

A record is only ever believed after `read_record`: keys have the right kind, and names in it are bare, so that no path
made of them leads out of the run's folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.json_file import parse_json, read_file
from align.errors import BadFile

CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})", re.ASCII)
SCHEMA_VERSION = 1  # of stage.json, run.json and results.json; those of before had no version, which is 0


@dataclass(frozen=True, slots=True)
class Kind:
    """The values that a key of a record may have: in words, as errors print them, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def is_bare_name(name: Any) -> bool:
    """Whether text is the name of a file within a folder: no path, nothing that a terminal would act upon."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "/" not in name
        and "\\" not in name
        and name.isprintable()  # no control characters, no lone surrogates
        and len(name.encode()) <= 255
    )


def is_inner_path(path: Any) -> bool:
    """Whether text is the path of a file inside a folder, with `/` between bare names."""
    return isinstance(path, str) and all(is_bare_name(part) for part in path.split("/"))


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of 0 or more."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def mapping_of(words: str, names: Callable[[Any], bool], values: Callable[[Any], bool]) -> Kind:
    """Mappings whose keys and values pass these tests."""
    return Kind(
        words,
        lambda value: isinstance(value, dict) and all(names(key) and values(item) for key, item in value.items()),
    )


def list_of(words: str, items: Callable[[Any], bool]) -> Kind:
    """Lists whose items pass this test."""
    return Kind(words, lambda value: isinstance(value, list) and all(map(items, value)))


def or_null(kind: Kind) -> Kind:
    """The same kind, or null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


TEXT = Kind("text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number of 0 or more", is_count)
NUMBER = Kind("a number", is_number)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
CHECKPOINT = Kind(
    "the name of a checkpoint",
    lambda value: isinstance(value, str) and CHECKPOINT_NAME.fullmatch(value) is not None,
)


def _is_sum(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


def _is_record_name(name: Any) -> bool:
    return is_bare_name(name) and name.endswith(".jsonl")


@dataclass(frozen=True, slots=True)
class Record:
    """One kind of record: the keys that it must and may have (others are let be), and what to do about a damaged one."""

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    remedy: str = ""


COMPLETE = Record(
    {
        "step": COUNT,
        "layout": TEXT,
        "records": mapping_of("a mapping of names of .jsonl files to sizes", _is_record_name, is_count),
        "files": mapping_of("a mapping of paths inside the checkpoint to size and CRC-32", is_inner_path, _is_sum),
        "digest": TEXT,
    },
    {"best_checkpoint": CHECKPOINT, "progress": MAPPING},
)
WANDB_RUN = Record(
    {
        "id": Kind(
            "the id of a W&B run", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w-]{1,64}", value))
        ),
        "processes": COUNT,
    },
    remedy="delete the file, and a new W&B run begins",
)


def read_record(path: Path, record: Record, *, nan_as_null: bool = False) -> dict[str, Any]:
    """A record, checked.

    Raises:
        BadFile: it is missing, a symbolic link, no JSON, or lacks a key or has one of another kind; says what to do.
    """
    try:
        value = parse_json(read_file(path, follow_links=False), path, nan_as_null=nan_as_null)
        check_record(value, record, path)
    except BadFile as error:
        raise BadFile(f"{error}{f'; {record.remedy}' * bool(record.remedy)}") from None
    found: dict[str, Any] = value
    return found


def check_record(value: Any, record: Record, where: str | Path) -> None:
    """Check that a value has the keys of a record.

    Args:
        where: begins the error: a path, or a path and a key.

    Raises:
        BadFile: a key is missing or has another kind.
    """
    if not isinstance(value, dict):
        raise BadFile(f"{where}: expected a mapping, got {shown(value)}")
    for name in record.required:
        if name not in value:
            raise BadFile(f"{where}: `{name}` is missing")
    for name, kind in {**record.required, **record.optional}.items():
        if name in value and not kind.holds(value[name]):
            raise BadFile(f"{where}: {name}: expected {kind.words}, got {shown(value[name])}")


def shown(value: Any) -> str:
    """The beginning of a value as JSON, in ASCII."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
