"""Read and validate a run's records, the JSON files in its folder; their schemas are in `align.runs.schemas`.

Nothing in a record is believed before `read_record` has checked it: keys have the right kind, and names are bare, so that
no path made of them leads out of the run's folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.json_file import MAX_BYTES, parse_json, read_file
from align.errors import BadFile, UserError
from align.runs.files import digest

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
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def mapping_of(words: str, names: Callable[[Any], bool], values: Callable[[Any], bool]) -> Kind:
    """Mappings whose keys and values pass these tests."""
    return Kind(
        words,
        lambda value: isinstance(value, dict) and all(names(key) and values(item) for key, item in value.items()),
    )


def or_null(kind: Kind) -> Kind:
    """The same kind, or null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def list_of(words: str, items: Callable[[Any], bool]) -> Kind:
    """Lists whose items pass this test."""
    return Kind(words, lambda value: isinstance(value, list) and all(map(items, value)))


def list_of_lists(words: str, items: Callable[[Any], bool]) -> Kind:
    """Lists of lists whose items pass this test."""
    return Kind(
        words,
        lambda value: (
            isinstance(value, list) and all(isinstance(each, list) and all(map(items, each)) for each in value)
        ),
    )


TEXT = Kind("text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number of 0 or more", is_count)
NUMBER = Kind("a number", is_number)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
CHECKPOINT = Kind(
    "the name of a checkpoint",
    lambda value: isinstance(value, str) and CHECKPOINT_NAME.fullmatch(value) is not None,
)


@dataclass(frozen=True, slots=True)
class Record:
    """One kind of record: the keys that it must and may have (others are let be), and what to do about a damaged one."""

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    remedy: str = ""
    max_bytes: int = MAX_BYTES


def read_record(path: Path, record: Record, *, follow_links: bool = False) -> dict[str, Any]:
    """A record, checked.

    Args:
        follow_links: as for `align.config.json_file.read_json`.

    Raises:
        BadFile: it is missing, a symbolic link, no JSON, or lacks a key or has one of another kind; says what to do.
        UserError: a newer version of this program wrote it.
    """
    try:
        raw = read_file(path, follow_links=follow_links, max_bytes=record.max_bytes)
        # Before there were versions, results that were not finite were written as NaN.
        value = parse_json(raw, path, nan_as_null=b'"schema_version"' not in raw)
        if isinstance(value, dict) and is_count(value.get("schema_version")):
            _check_version(value, path)
        check_record(value, record, path)
        if "fingerprint" in value and value["fingerprint"] != fingerprint_of(value):
            raise BadFile(f"{path}: was changed since it was written: its fingerprint does not match")
    except BadFile as error:
        raise BadFile(f"{error}{f'; {record.remedy}.' * bool(record.remedy)}") from None
    found: dict[str, Any] = value
    return found


def fingerprint_of(record: Mapping[str, Any]) -> str:
    """A digest of a run's stage, recipe and inputs."""
    return digest([record["stage"], record["recipe"], record["inputs"]])


def package_version(package: str) -> str:
    """The installed version of a package, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check_version(value: Mapping[str, Any], path: Path) -> None:
    if value["schema_version"] > SCHEMA_VERSION:
        writer = value["versions"].get("align") if isinstance(value.get("versions"), dict) else None
        raise UserError(
            f"{path}: has schema_version {value['schema_version']}{f', of align {writer}' * bool(writer)}, and this is align "
            f"{package_version('align')}, which reads up to {SCHEMA_VERSION}; use the version that wrote it, or "
            "a newer one."
        )


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
