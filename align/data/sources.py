"""Raw rows from files, the hub and generators."""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import io
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import datasets

from align.config.data_source import ROW_COLUMNS, DataSource
from align.config.functions import resolve_function
from align.config.text_file import check_regular
from align.data.compressed import BoundedGzip, characters, check_expansion
from align.data.hub import go_offline_if_unreachable
from align.errors import BadRow, UserError
from align.terminal import say

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_ROW = 2**25  # characters of a row; a tokenizer needs a minute and gigabytes for so many
MAX_GENERATED_ROWS = 2_000_000  # without a larger `max_rows`; all rows are held in memory
REPORT_SECONDS = 10.0


def files_of(path: str) -> list[str]:
    """The files that a path or a glob names; none for a hub id."""
    return sorted(glob.glob(path, recursive=True)) or ([path] if os.path.exists(path) else [])


def read_source(source: DataSource, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) for each raw row of a source; the row is a `BadRow` where it cannot be read.

    Args:
        key: of the recipe, that has the source.

    Raises:
        UserError: the file, data set or generator is missing or fails.
    """
    if source.generator is not None:
        yield from _generated(source.generator, source.generator_kwargs, max(MAX_GENERATED_ROWS, source.max_rows or 0))
        return
    path = str(source.path)
    files = files_of(path)
    for file in files:
        yield from _read_file(file, source, key)
    if files:
        return
    if glob.has_magic(path) or path.startswith(("/", ".", "~")) or path.removesuffix(".gz").endswith(SUFFIXES):
        raise UserError(f"{key}: {path}: no such file; fix the path.")
    go_offline_if_unreachable()
    try:
        rows = datasets.load_dataset(path, source.name, split=source.split)
    except Exception as error:  # the network, the hub and the data set's own files fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}: {path}: neither a file nor a data set that could be fetched from the hub (name {source.name}, split "
            f"{source.split}): {reason}. Check the id, the network and your hub login, or download it and name the file."
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:{source.split}:{number}", _without_filled(row)


def _generated(spec: str, arguments: Mapping[str, Any], most: int) -> Iterator[tuple[str, Any]]:
    function = resolve_function(spec, "generator")
    count = 0
    with _reported_when_slow(lambda: f"generator: {spec}: {count:,} rows"):
        try:
            for count, row in enumerate(function(**arguments), 1):
                if count > most:
                    break
                # A copy: generators may change and yield one mapping again and again.
                yield f"{spec}:{count}", dict(row) if isinstance(row, Mapping) else row
        except (Exception, SystemExit) as error:  # the user's function may raise anything
            after = f" after {count:,} rows" if count else ""
            raise UserError(f"generator: {spec} failed{after} with {type(error).__name__}: {error}") from error
    if count > most:
        raise UserError(
            f"generator: {spec} yields more than {most:,} rows, and may never end; make it end, or set `max_rows` to more "
            "than it yields."
        )


@contextlib.contextmanager
def _reported_when_slow(describe: Callable[[], str]) -> Iterator[None]:
    """Print what `describe` says, on rank 0, as long as the block has not ended after some seconds."""
    ended = threading.Event()

    def report() -> None:
        began = time.monotonic()
        while not ended.wait(REPORT_SECONDS):
            say(f"{describe()} after {time.monotonic() - began:.0f} s; Ctrl-C ends it")

    if os.environ.get("RANK", "0") == "0":
        threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _read_file(file: str, source: DataSource, key: str) -> Iterator[tuple[str, Any]]:
    kind = Path(file.removesuffix(".gz")).suffix
    if kind not in SUFFIXES or os.path.isdir(file):
        raise UserError(
            f"{key}: {file}: expected a {', '.join(SUFFIXES)} file (.gz allowed); to read a folder, use a glob."
        )
    check_regular(file, key)
    try:
        if kind in (".json", ".jsonl"):
            yield from _read_json(file)
            return
        # Streamed: a cached copy could be taken for a newer version of the file.
        options: dict[str, Any] = {}
        if kind == ".parquet":
            options = {"batch_size": 256}  # rows in memory at once: of one repeated text, a file may have any number
        if kind == ".csv":  # our columns are text, even if they read "42" or "None"
            numbers = {source.columns.get(name, name) for name in ("label", "margin", "tie", "strength")}  # perhaps
            ours = {*ROW_COLUMNS, *source.columns.values()} - numbers
            _check_csv(file, ours | numbers)
            options = {"converters": dict.fromkeys(ours, str), "keep_default_na": False, "na_values": [""]}
        rows = datasets.load_dataset(
            kind[1:], data_files=[glob.escape(os.path.abspath(file))], split="train", streaming=True, **options
        )
        expanded = 0
        for number, row in enumerate(rows, 1):
            check_expansion(file, expanded := expanded + characters(row))
            yield f"{file}:{number}", _without_filled(row)
    except UserError:
        raise
    except Exception as error:  # unreadable, truncated, another encoding, another format than the name says
        raise UserError(f"{file}: cannot be read as {kind[1:]}: {type(error).__name__}: {error}") from error


def _without_filled(value: Any, of_tools: bool = False) -> Any:
    """A row of a table, whose types are those of its columns, without the keys that were put into tools and calls of them."""
    if isinstance(value, dict):
        return {
            key: _without_filled(each, of_tools or key in ("tools", "tool_calls"))
            for key, each in value.items()
            if not (of_tools and each is None)
        }
    return [_without_filled(each, of_tools) for each in value] if isinstance(value, list) else value


def _open_text(file: str, newline: str | None = None) -> TextIO:
    """A text file, gzipped or not, in which bytes that are not UTF-8 become lone surrogates: their rows are named later."""
    raw: Any = (BoundedGzip if file.endswith(".gz") else io.FileIO)(file)
    opened: TextIO = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    head = opened.read(2).encode(errors="surrogateescape")[:2]
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        opened.close()
        raise UserError(f"{file}: is in UTF-16; save it in UTF-8.")
    opened.seek(0)
    return opened


def is_utf8(text: str) -> bool:
    """Whether text can be written as UTF-8; not if it holds lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_json(file: str) -> Iterator[tuple[str, Any]]:
    """JSON lines, or one JSON list.

    Not read with `datasets`: Arrow needs one type per column, so one odd row would make the file unreadable.
    """
    with _open_text(file) as lines:
        blank = " "
        while blank.isspace():
            blank = lines.read(1 << 16)
        lines.seek(0)
        if blank.lstrip().startswith("["):
            yield from ((f"{file}:{number}", row) for number, row in enumerate(_read_list(lines), 1))
            return
        number = 0
        while line := lines.readline(MAX_ROW + 1):
            number += 1
            if len(line) > MAX_ROW:
                while line and not line.endswith("\n"):
                    line = lines.readline(MAX_ROW)
                yield f"{file}:{number}", BadRow(f"more than {MAX_ROW:,} characters")
            elif line.strip():
                yield f"{file}:{number}", _parse_row(line)


def _read_list(lines: TextIO) -> list[Any]:
    text = lines.read()
    if not is_utf8(text):
        number = next(number for number, line in enumerate(text.splitlines(), 1) if not is_utf8(line))
        raise ValueError(f"line {number} is not UTF-8; save the file in UTF-8")
    rows: list[Any] = json.loads(text)
    return rows


def _parse_row(line: str) -> Any:
    if not is_utf8(line):
        return BadRow("not valid UTF-8")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return BadRow("not valid JSON")


def _check_csv(file: str, used: Collection[str]) -> None:
    """Check for rows that pandas would silently repair: given too many cells, it uses the first as index and shifts the rest.

    Args:
        used: names of columns that the row may be read from.

    Raises:
        UserError: a row with more cells than the header, one that is not UTF-8, or a column in `used` that occurs twice.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))
    with _open_text(file, newline="") as lines:
        rows = (cells for cells in csv.reader(lines) if cells)
        header = next(rows, [])
        for name in header:
            if name in used and header.count(name) > 1:
                raise UserError(f"{file}: the header names the column `{name}` twice; rename one of them.")
        number = 0
        try:
            for number, cells in enumerate(rows, 1):
                if len(cells) > len(header):
                    raise UserError(
                        f"{file}:{number}: has {len(cells)} cells, and the header has {len(header)}; put cells that hold "
                        "commas in double quotes."
                    )
                if not all(map(is_utf8, cells)):
                    raise UserError(f"{file}:{number}: is not UTF-8; save the file in UTF-8.")
        except csv.Error as error:
            raise UserError(f"{file}:{number + 1}: cannot be read as csv: {error}") from error
