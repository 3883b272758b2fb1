"""Load data sources, check every row, and split the rows into training and evaluation rows."""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

from align.config.base import StageRecipe
from align.config.data_source import DataSource
from align.data.columns import choose_formats, missing_column
from align.data.duplicates import find_duplicates
from align.data.formats import read_row
from align.data.mixture import repeat_rows, seeded_sample, task_counts, times_used
from align.data.rows import BadRows, Row
from align.data.sources import MAX_ROW, files_of, read_source
from align.data.split import EmptySplit, NoHeldOutRows, is_for_judge, is_held_out, prompts_of, without_prompts
from align.data.templates import RENDERINGS, TASK, TEMPLATE, SourceTemplates, task_name
from align.errors import BadRow, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which rows are loaded and how they are split: recipe keys, documented in `align.config.base`."""

    train_dataset: Sequence[DataSource]
    eval_dataset: Sequence[DataSource] = ()
    eval_fraction: float = 0.0
    max_eval_rows: int | None = None
    mixture_temperature: float = 1.0
    on_bad_row: str = "error"
    seed: int

    @classmethod
    def from_recipe(cls, recipe: StageRecipe) -> DataSettings:
        """The settings of a stage's training and evaluation rows."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Rows:
    """The two splits. `report` is JSON-able: sources with fingerprints, row counts, bad rows by reason, duplicates."""

    train: list[Any]
    evaluation: list[Any]
    report: dict[str, Any]


def load_rows(
    settings: DataSettings,
    row_type: type,
    key: str = "train_dataset",
    templates: Mapping[str, Mapping[str, str]] | None = None,
) -> Rows:
    """Read, check and split the data.

    No prompt is in both splits. With `eval_dataset`, training rows that would train on one of its prompts are dropped
    and counted. Without it, rows are held out by a hash of their opening (a dialogue up to its first user turn, otherwise
    the full prompt or text) and the seed, so that an opening falls on the same side in every stage, and a dialogue with
    all its continuations. Training rows keep the order of the data.

    Args:
        row_type: `Prompt`, `Demonstration`, `Preference`, `Labelled` or `Passage`.
        key: of the recipe, that has the training rows.
        templates: by name, in place of the sources' own: each renders every row. The first one's is the row by which data
            is split; those of the others are in its `extra`, under `RENDERINGS`.

    Raises:
        UserError: a source is missing, empty or lacks a column; there are bad rows and `on_bad_row` is "error"; a split
            is empty (`NoHeldOutRows` if `eval_fraction` left the evaluation split empty).
    """
    return _load_parts(settings, row_type, key, [lambda row: True], templates)[0]


def load_halves(settings: DataSettings, row_type: type) -> tuple[Rows, Rows]:
    """`load_rows` for a reward model and its judge (`train_judge`): each has half of the training rows, by prompt, and both the
    same evaluation rows.

    Raises:
        UserError: as for `load_rows`, or a half is empty.
    """
    halves = [lambda row: not is_for_judge(row), is_for_judge]
    reward, judge = _load_parts(settings, row_type, "train_dataset", halves)
    return reward, judge


def _load_parts(
    settings: DataSettings,
    row_type: type,
    key: str,
    parts: Sequence[Callable[[Row], bool]],
    named: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Rows]:
    """The rows for each of `parts`, which says of a training row whether it takes it. The data is read once."""
    if any(source.weight != 1 for source in settings.eval_dataset):
        raise UserError("eval_dataset: `weight` is for training rows; limit evaluation rows by `max_rows`.")
    bad = BadRows()
    loaded = [_load_source(source, key, settings.seed, row_type, bad, named) for source in settings.train_dataset]
    loaded_eval = [
        _load_source(source, "eval_dataset", settings.seed, row_type, bad, named) for source in settings.eval_dataset
    ]
    bad_rows = bad.raise_or_report(settings.on_bad_row)
    training, evaluation, dropped = _split(
        [rows for rows, _ in loaded], list(chain.from_iterable(rows for rows, _ in loaded_eval)), settings
    )
    if settings.max_eval_rows is not None:
        evaluation = seeded_sample(evaluation, settings.max_eval_rows, f"{settings.seed} evaluation")
    found = []
    for takes in parts:
        used = _mix([list(filter(takes, rows)) for rows in training], settings)
        train = list(chain.from_iterable(used))
        report = {
            "sources": [
                *(
                    {**description, "used_for": "training", "train_rows": len(rows)}
                    for (_, description), rows in zip(loaded, used, strict=True)
                ),
                *({**description, "used_for": "evaluation"} for _, description in loaded_eval),
            ],
            "train_rows": len(train),
            "evaluation_rows": len(evaluation),
            "tasks": task_counts(train, evaluation),
            "train_rows_dropped_as_evaluated": dropped,
            "bad_rows": bad_rows,
            "duplicates": find_duplicates(train, evaluation),
            "fingerprints": {"train": _fingerprint(train), "evaluation": _fingerprint(evaluation)},
        }
        try:
            if len(parts) > 1 and not train and any(training):
                raise EmptySplit(
                    f"train_judge: all {sum(map(len, training))} training pairs are in one half (each is drawn by its prompt), and "
                    "none is left for the other model; add pairs of other prompts, or leave the key out."
                )
            _check_not_empty(train, evaluation, dropped, bad, settings)
        except EmptySplit as error:
            error.report = report if key == "train_dataset" else None
            raise
        found.append(Rows(train, evaluation, report))
    return found


def _fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of rows in their order, without the file names in `where`."""
    digest = hashlib.sha256()
    for row in rows:
        content = replace(row, where="", extra={name: value for name, value in row.extra.items() if name != TASK})
        digest.update(_without_addresses(content).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _without_addresses(value: Any) -> str:
    """`repr` without the memory addresses that other objects (images, ...) print, which differ between runs."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _split(
    sources: Sequence[list[Row]], evaluation: list[Row], settings: DataSettings
) -> tuple[list[list[Row]], list[Row], int]:
    """Training rows of each source, evaluation rows, and the number of training rows dropped for their prompt."""
    if settings.eval_dataset:
        evaluated = prompts_of(evaluation)
        training = [without_prompts(rows, evaluated) for rows in sources]
        return training, evaluation, sum(map(len, sources)) - sum(map(len, training))
    training = []
    for rows in sources:
        held_out = [is_held_out(row, settings.eval_fraction, settings.seed) for row in rows]
        training.append([row for row, out in zip(rows, held_out, strict=True) if not out])
        evaluation += [row for row, out in zip(rows, held_out, strict=True) if out]
    return training, evaluation, 0


def _mix(training: Sequence[list[Row]], settings: DataSettings) -> list[list[Row]]:
    """The rows of each source, repeated or sampled as weights and mixture temperature say."""
    weights = [source.weight for source in settings.train_dataset]
    times = times_used([len(rows) for rows in training], weights, settings.mixture_temperature)
    return [
        repeat_rows(rows, each, f"{settings.seed} weight {number}")
        for number, (rows, each) in enumerate(zip(training, times, strict=True))
    ]


def _check_not_empty(
    train: Sequence[Row], evaluation: Sequence[Row], dropped: int, bad: BadRows, settings: DataSettings
) -> None:
    if not train:
        raise EmptySplit(
            f"train_dataset: no training row is left: {len(evaluation)} are for evaluation, {dropped} were dropped because "
            f"eval_dataset has their prompt, and these are bad rows: {bad.summary()}. Give more or other rows"
            f"{'.' if settings.eval_dataset else ', or lower `eval_fraction`.'}"
        )
    if not evaluation and settings.eval_dataset:
        raise EmptySplit(f"eval_dataset: no evaluation row is left; bad rows: {bad.summary()}. Give other rows.")
    if not evaluation and settings.eval_fraction > 0:
        raise NoHeldOutRows(
            f"eval_fraction: with {settings.eval_fraction:g}, none of the {len(train)} rows is held out for evaluation (each "
            "is drawn by its prompt); raise it, give an `eval_dataset`, or set it to 0 to train without evaluation."
        )


def _load_source(
    source: DataSource,
    key: str,
    seed: int,
    row_type: type,
    bad: BadRows,
    named: Mapping[str, Mapping[str, str]] | None,
) -> tuple[list[Row], dict[str, Any]]:
    """The usable rows of one source, and its entry in the report."""
    name = str(source.path or source.generator)
    raw = list(read_source(source, key))
    if not raw:
        raise UserError(f"{name}: expected rows, found none; name a source that holds data.")
    mappings = [values for _, values in raw if isinstance(values, Mapping)]
    columns = list(dict.fromkeys(str(column) for values in mappings for column in values))
    for mapped, theirs in source.columns.items():
        if mappings and theirs not in columns:
            raise missing_column(name, [theirs], columns, ours=[mapped])
    renamed = set(source.columns.values())
    templates = SourceTemplates(source, seed, columns, named) if (source.templates or named) and mappings else None
    readable = ["prompt", "completion"] if templates else [*source.columns, *(c for c in columns if c not in renamed)]
    formats = choose_formats(name, readable, row_type) if mappings else []  # without, all rows are bad rows
    if source.max_rows is not None:
        # Of the same file in another folder, the same rows.
        drawn_by = os.path.basename(name) if source.path and files_of(source.path) else name
        raw = seeded_sample(raw, source.max_rows, f"{seed} rows of {drawn_by}")
    rows: list[Row] = []
    digest = hashlib.sha256()
    for where, values in raw:
        with bad.catch(where):
            if isinstance(values, BadRow):
                raise values
            if not isinstance(values, Mapping):
                raise BadRow("not a mapping of columns")
            if not all(isinstance(column, str) for column in values):
                raise BadRow("a column whose name is not text")
            ours = {column: value for column, value in values.items() if column not in renamed}
            ours |= {column: values.get(theirs) for column, theirs in source.columns.items()}
            try:
                line = json.dumps(ours, sort_keys=True, ensure_ascii=False, default=_without_addresses).encode()
            except UnicodeEncodeError:
                raise BadRow("not valid Unicode (a lone surrogate)") from None
            except (TypeError, ValueError, RecursionError):
                raise BadRow("nested too deeply, or with keys that are not text") from None
            if len(line) > MAX_ROW:
                raise BadRow(f"more than {MAX_ROW:,} characters")
            if templates:
                written = []
                for rendered, metadata in templates.apply(line, where):
                    written.append(read_row(rendered, where, row_type, formats))
                    written[-1].extra.update(ours | metadata)
            else:
                written = [read_row(ours, where, row_type, formats)]
            for row in written:
                if source.task or TASK not in row.extra:
                    row.extra[TASK] = task_name(source)
            if named:
                written[0].extra[RENDERINGS] = written[1:]
            rows.append(written[0])
            digest.update(line + b"\n")
    description = {"source": name, "task": task_name(source), "rows": len(rows), "weight": source.weight}
    if templates and not named:
        description["templates"] = [sum(row.extra[TEMPLATE] is each for row in rows) for each in source.templates]
    return rows, {**description, "fingerprint": digest.hexdigest()}
