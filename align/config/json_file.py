"""JSON: bounded, strict, and with errors in one line."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from align.errors import BadFile

MAX_BYTES = 64 << 20
MAX_DEPTH = 64  # of lists and mappings


def read_json(path: str | Path, *, follow_links: bool, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        BadFile: as `read_file` and `parse_json`.
    """
    return parse_json(read_file(path, follow_links=follow_links, max_bytes=max_bytes), path)


def read_file(path: str | Path, *, follow_links: bool, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `max_bytes`.

    Args:
        follow_links: whether `path` itself may be a symbolic link.

    Raises:
        BadFile: there is none, or it cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe without a writer would block
    try:
        descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise BadFile(f"{path}: is a symbolic link, expected a file") from None
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BadFile(f"{path}: is not a regular file")
        if found.st_size > max_bytes:
            raise BadFile(f"{path}: has {found.st_size} bytes, expected at most {max_bytes}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def parse_json(raw: bytes, path: str | Path, *, nan_as_null: bool = False) -> Any:
    """The value that JSON text stands for.

    Args:
        path: begins the error.
        nan_as_null: whether NaN and infinities, which are not JSON, are read as null rather than refused.

    Raises:
        BadFile: it is empty, not UTF-8 or not JSON (NaN, infinities, lone surrogates and a key that is written twice are
            not), or nested too deeply.
    """

    def constant(name: str) -> None:
        if not nan_as_null:
            raise ValueError(f"{name} is not a number of JSON")

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is too large a number")
        return value

    if not raw.strip():
        raise BadFile(f"{path}: is empty")
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=constant, parse_float=number, object_pairs_hook=_without_repeats
        )
    except UnicodeDecodeError as error:
        _refuse(path, f"byte {error.start} is not UTF-8")
    except RecursionError:
        _refuse(path, f"nested more than {MAX_DEPTH} deep")
    except ValueError as error:
        _refuse(path, str(error))
    if problem := _problem(value):
        _refuse(path, problem)
    return value


def _refuse(path: str | Path, why: str) -> NoReturn:
    raise BadFile(f"{path}: not valid JSON: {why}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is written twice")
    return found


def _problem(value: Any) -> str | None:
    """Why a parsed value is unusable (nested too deeply, or invalid Unicode); None if it is not."""
    level = [value]
    for _ in range(MAX_DEPTH):
        for text in (*level, *(name for each in level if isinstance(each, dict) for name in each)):
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    return "a lone surrogate is not Unicode"
        level = [
            inner
            for each in level
            if isinstance(each, list | dict)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return None
    return f"nested more than {MAX_DEPTH} deep"
