"""Raw rows from files, the hub and generators."""

from __future__ import annotations

import glob
import gzip
import json
import os.path
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from align.config.data_source import ROW_COLUMNS, DataSource
from align.config.load import resolve_function
from align.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_source(source: DataSource) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) for each raw row of a source; the row is None where a line is not valid JSON.

    Raises:
        UserError: the file, data set or generator is missing or fails.
    """
    if source.generator is not None:
        yield from _generated(source.generator, source.generator_kwargs)
        return
    path = str(source.path)
    files = sorted(glob.glob(path, recursive=True)) or ([path] if os.path.exists(path) else [])
    for file in files:
        yield from _read_file(file, source)
    if files:
        return
    if glob.has_magic(path) or path.startswith(("/", ".", "~")) or path.removesuffix(".gz").endswith(SUFFIXES):
        raise UserError(f"{path}: no such file; fix the path in the recipe.")
    try:
        rows = datasets.load_dataset(path, source.name, split=source.split)
    except Exception as error:  # the network, the hub and the data set's own files fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: neither a file nor a data set that could be fetched from the hub (name {source.name}, split "
            f"{source.split}): {reason}. Check the id, the network and your hub login, or download it and name the file."
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:{source.split}:{number}", row


def _generated(spec: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    function = resolve_function(spec, "generator")
    try:
        for number, row in enumerate(function(**arguments), 1):
            yield f"{spec}:{number}", row
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"generator: {spec} failed with {type(error).__name__}: {error}") from error


def _read_file(file: str, source: DataSource) -> Iterator[tuple[str, Any]]:
    kind = Path(file.removesuffix(".gz")).suffix
    if kind not in SUFFIXES or os.path.isdir(file):
        raise UserError(f"{file}: expected a {', '.join(SUFFIXES)} file (.gz allowed); to read a folder, use a glob.")
    try:
        if kind in (".json", ".jsonl"):
            yield from _read_json(file)
            return
        # Streamed: a cached copy could be taken for a newer version of the file.
        options: dict[str, Any] = {}
        if kind == ".csv":  # our columns are text, even if they read "42" or "None"
            label = source.columns.get("label", "label")  # may be a number
            ours = {*ROW_COLUMNS, *source.columns.values()} - {label}
            options = {"converters": dict.fromkeys(ours, str), "keep_default_na": False, "na_values": [""]}
        rows = datasets.load_dataset(kind[1:], data_files=[file], split="train", streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield f"{file}:{number}", row
    except UserError:
        raise
    except Exception as error:  # unreadable, truncated, another encoding, another format than the name says
        raise UserError(f"{file}: cannot be read as {kind[1:]}: {type(error).__name__}: {error}") from error


def _read_json(file: str) -> Iterator[tuple[str, Any]]:
    """JSON lines, or one JSON list.

    Not read with `datasets`: Arrow needs one type per column, so one odd row would make the file unreadable.
    """
    open_text = gzip.open if file.endswith(".gz") else open
    with open_text(file, "rt", encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if first.lstrip().startswith("["):
            yield from ((f"{file}:{number}", row) for number, row in enumerate(json.load(lines), 1))
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                yield f"{file}:{number}", row
