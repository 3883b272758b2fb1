"""The recipe's sources, read, checked, and split into training and evaluation rows."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import datasets

from align.config import DataSource, StageRecipe, UserError
from align.duplicates import find_duplicates
from align.formats import choose_formats, missing_column, read_row
from align.limits import COLUMNS
from align.mixture import sample, task_counts, times_used, weighted
from align.recipes import resolve_function
from align.rows import (
    BadRow,
    BadRows,
    Demonstration,
    Labelled,
    Passage,
    Preference,
    Prompt,
    Row,
    Turns,
    as_response,
    canonical,
    render_text,
)
from align.templates import TASK, TEMPLATE, Instructions, task_name

__all__ = [
    "Demonstration",
    "Labelled",
    "NoneHeldOut",
    "Passage",
    "Preference",
    "Prompt",
    "Rows",
    "Turns",
    "as_response",
    "free_of",
    "load_rows",
    "prompts_of",
    "render_text",
]

AnyRow = TypeVar("AnyRow", bound=Row)


class NoneHeldOut(UserError):
    """`eval_fraction` of the prompts came to none."""


SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True, slots=True)
class Rows:
    """Both sides of the data. `report` is JSON-able: sources with fingerprints, counts, bad rows by reason."""

    train: list[Any]
    evaluation: list[Any]
    report: dict[str, Any]


def load_rows(recipe: StageRecipe, form: type) -> Rows:
    """Read, check and split the recipe's data.

    No prompt is on both sides. Without `eval_dataset`, `eval_fraction` of the openings (a dialogue up to its first user
    turn, else the whole prompt or text) is held out by a hash of the opening and the seed: an opening is on one and the
    same side in every stage, however long the dialogue that follows. With `eval_dataset`, training rows that would
    train on one of its prompts are dropped and counted. Training rows keep the order of the data.

    Args:
        form: `Prompt`, `Demonstration`, `Preference`, `Labelled` or `Passage`.

    Raises:
        UserError: a source is missing, empty or lacks a column; there are bad rows and `on_bad_row` is "error"; a side
            is empty (`NoneHeldOut` when that is by `eval_fraction`).
    """
    if any(source.weight != 1 for source in recipe.eval_dataset):
        raise UserError("eval_dataset: `weight` is for training rows; limit evaluation rows by `max_rows`.")
    bad = BadRows()
    loaded = [_load(source, recipe.seed, form, bad) for source in (*recipe.train_dataset, *recipe.eval_dataset)]
    bad_rows = bad.settle(recipe.on_bad_row)
    sources = [rows for rows, _ in loaded]
    evaluation = list(chain.from_iterable(sources[len(recipe.train_dataset) :]))
    evaluated = prompts_of(evaluation)
    training: list[list[Row]] = []
    dropped = 0
    for rows in sources[: len(recipe.train_dataset)]:
        if recipe.eval_dataset:
            kept = free_of(rows, evaluated)
            dropped += len(rows) - len(kept)
        else:
            held_out = [_is_held_out(row, recipe) for row in rows]
            kept = [row for row, out in zip(rows, held_out, strict=True) if not out]
            evaluation += [row for row, out in zip(rows, held_out, strict=True) if out]
        training.append(kept)
    weights = [source.weight for source in recipe.train_dataset]
    times = times_used([len(rows) for rows in training], weights, recipe.mixture_temperature)
    used = [
        weighted(rows, each, f"{recipe.seed} weight {number}")
        for number, (rows, each) in enumerate(zip(training, times, strict=True))
    ]
    train = list(chain.from_iterable(used))
    if not train:
        raise UserError(
            f"train_dataset: no training row is left: {len(evaluation)} are for evaluation, {dropped} were dropped because "
            f"eval_dataset has their prompt, and these are bad rows: {bad.summary()}. Give more or other rows, or lower "
            "`eval_fraction`."
        )
    if not evaluation and recipe.eval_dataset:
        raise UserError(f"eval_dataset: no evaluation row is left; bad rows: {bad.summary()}. Give other rows.")
    if not evaluation and recipe.eval_fraction > 0:
        raise NoneHeldOut(
            f"eval_fraction: {recipe.eval_fraction} of the prompts of {len(train)} rows came to none; raise it, give "
            "an `eval_dataset`, or set `eval_fraction: 0` to train without evaluation."
        )
    if recipe.max_eval_rows is not None:
        evaluation = sample(evaluation, recipe.max_eval_rows, f"{recipe.seed} evaluation")
    uses = [{"used_for": "training", "train_rows": len(rows)} for rows in used]
    uses += [{"used_for": "evaluation"}] * len(recipe.eval_dataset)
    report = {
        "sources": [{**description, **use} for (_, description), use in zip(loaded, uses, strict=True)],
        "train_rows": len(train),
        "evaluation_rows": len(evaluation),
        "tasks": task_counts(train, evaluation),
        "train_rows_dropped_as_evaluated": dropped,
        "bad_rows": bad_rows,
        "duplicates": find_duplicates(train, evaluation),
    }
    return Rows(train, evaluation, report)


def _context(row: Row) -> list[tuple[str, str]]:
    return canonical(row.completion if isinstance(row, Demonstration) and not row.prompt else row.prompt)


def _is_held_out(row: Row, recipe: StageRecipe) -> bool:
    turns = _context(row)
    opening = turns[: 1 + [role for role, _ in turns].index("user")]
    digest = hashlib.sha256(json.dumps([recipe.seed, opening]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < recipe.eval_fraction * 2**64


def _prompts(row: Row) -> list[str]:
    """Every prompt that the row trains a response to."""
    turns = _context(row)
    earlier = [index for index, (role, _) in enumerate(turns) if role == "assistant"]
    trained = row.trained_turns - 1 if isinstance(row, Demonstration) else 0
    return [json.dumps(turns[:end]) for end in (*earlier[len(earlier) - trained :], len(turns))]


def prompts_of(rows: Sequence[Row]) -> set[str]:
    """Every prompt that one of the rows trains a response to."""
    return {prompt for row in rows for prompt in _prompts(row)}


def free_of(rows: Sequence[AnyRow], prompts: set[str]) -> list[AnyRow]:
    """The rows that train a response to none of the prompts."""
    return [row for row in rows if prompts.isdisjoint(_prompts(row))]


def _load(source: DataSource, seed: int, form: type, bad: BadRows) -> tuple[list[Row], dict[str, Any]]:
    """The usable rows of one source, and what the report says of it."""
    name = str(source.path or source.generator)
    raw = list(_read(source))
    if not raw:
        raise UserError(f"{name}: expected rows, found none; name a source that holds data.")
    columns = list(dict.fromkeys(key for _, values in raw if isinstance(values, Mapping) for key in values))
    for theirs in source.columns.values():
        if theirs not in columns:
            raise missing_column(name, theirs, columns)
    taken = set(source.columns.values())
    instructions = Instructions(source, seed, columns) if source.templates else None
    given = ["prompt", "completion"] if instructions else [*source.columns, *(c for c in columns if c not in taken)]
    formats = choose_formats(name, given, form)
    if source.max_rows is not None:
        raw = sample(raw, source.max_rows, f"{seed} rows of {name}")
    rows: list[Row] = []
    digest = hashlib.sha256()
    for where, values in raw:
        with bad.counted(where):
            if not isinstance(values, Mapping):
                raise BadRow("not a mapping of columns" if values is not None else "not valid JSON")
            ours = {column: value for column, value in values.items() if column not in taken}
            ours |= {column: values.get(theirs) for column, theirs in source.columns.items()}
            try:
                line = json.dumps(ours, sort_keys=True, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError:
                raise BadRow("not valid Unicode (a lone surrogate)") from None
            if instructions:
                said, drawn = instructions.apply(line, where)
                row = read_row(said, where, form, formats)
                row.extra.update(ours | drawn)
            else:
                row = read_row(ours, where, form, formats)
            if source.task or TASK not in row.extra:
                row.extra[TASK] = task_name(source)
            rows.append(row)
            digest.update(line + b"\n")
    description = {"source": name, "task": task_name(source), "rows": len(rows), "weight": source.weight}
    if instructions:
        description["templates"] = [sum(row.extra[TEMPLATE] is each for row in rows) for each in source.templates]
    return rows, {**description, "fingerprint": digest.hexdigest()}


def _read(source: DataSource) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row; the row is None where a line is not JSON."""
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
        raise UserError(f"{path}: no such file; correct the path in the recipe.")
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
    except Exception as error:  # whatever the user's function raises, it is theirs to mend
        raise UserError(f"generator: {spec} failed with {type(error).__name__}: {error}") from error


def _read_file(file: str, source: DataSource) -> Iterator[tuple[str, Any]]:
    kind = Path(file.removesuffix(".gz")).suffix
    if kind not in SUFFIXES or os.path.isdir(file):
        raise UserError(f"{file}: expected a {', '.join(SUFFIXES)} file (.gz allowed); to read a folder, use a glob.")
    try:
        if kind in (".json", ".jsonl"):
            yield from _read_json(file)
            return
        # Streamed, so that no copy is left in the cache that could be taken for a newer file.
        options: dict[str, Any] = {}
        if kind == ".csv":  # our columns are text, whatever they look like: "42" and "None" too
            label = source.columns.get("label", "label")  # which may be a number
            ours = {*COLUMNS, *source.columns.values()} - {label}
            options = {"converters": dict.fromkeys(ours, str), "keep_default_na": False, "na_values": [""]}
        rows = datasets.load_dataset(kind[1:], data_files=[file], split="train", streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield f"{file}:{number}", row
    except UserError:
        raise
    except Exception as error:  # unreadable, truncated, another encoding, another format than the name says
        raise UserError(f"{file}: cannot be read as {kind[1:]}: {type(error).__name__}: {error}") from error


def _read_json(file: str) -> Iterator[tuple[str, Any]]:
    """JSON lines or one JSON list. Not by `datasets`: Arrow wants one type per column, and refuses the file for a row."""
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
