"""From files, hub data sets and generators to checked rows, and from rows to training and evaluation sides.

A row arrives in any of TRL's formats (prompt-completion, messages, text, preference with an explicit or implicit
prompt, prompt only), as text, as messages, or as an Anthropic HH transcript, and leaves as a `Prompt`, a
`Demonstration` or a `Preference`. What cannot be used is a `BadRow`: named, counted, then refused or skipped.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import gzip
import hashlib
import json
import os.path
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets

from align.config import DataSource, StageRecipe, UserError

Turns = str | list[dict[str, str]]
"""Plain text, or messages with the keys `role` (system, user, assistant) and `content`."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy answers. `where` names file and row (1-based); `extra` holds the row's other columns."""

    prompt: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to imitate. Plain text to continue has the prompt `""`.

    `trained_turns` counts the assistant turns to learn, from the last one backwards: 1 is the completion alone, more
    reaches into the prompt (rows that came as whole dialogues).
    """

    prompt: Turns
    completion: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)
    trained_turns: int = 1


@dataclass(frozen=True, slots=True)
class Preference:
    """Two responses to one prompt, the first preferred."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


Row = Prompt | Demonstration | Preference

COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "text")
# What each form can be made of, first choice first. A pair may come with a `prompt` column or imply its prompt.
FORMATS: dict[type, list[tuple[str, ...]]] = {
    Preference: [("chosen", "rejected")],
    Demonstration: [("prompt", "completion"), ("messages",), ("chosen", "rejected"), ("text",)],
    Prompt: [("prompt", "completion"), ("messages",), ("chosen", "rejected"), ("prompt",), ("text",)],
}
FILES = (".jsonl", ".json", ".parquet", ".csv")


class BadRow(UserError):
    """This row cannot be used; the message is the reason, in words that many rows can share."""


class BadRows:
    """Bad rows by reason."""

    def __init__(self) -> None:
        self.by_reason: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def counted(self, where: str) -> Iterator[None]:
        """Note a `BadRow` raised in the block, and go on after it."""
        try:
            yield
        except BadRow as bad:
            self.by_reason.setdefault(str(bad), []).append(where)

    def report(self) -> dict[str, dict[str, Any]]:
        """`{reason: {"count": n, "first": ["file:row", ...]}}`, at most five rows named per reason."""
        return {reason: {"count": len(rows), "first": rows[:5]} for reason, rows in self.by_reason.items()}

    def settle(self, on_bad_row: str) -> dict[str, dict[str, Any]]:
        """The report.

        Raises:
            UserError: there are bad rows and `on_bad_row` is not "skip".
        """
        if self.by_reason and on_bad_row != "skip":
            lines = [
                f"  {reason}: {len(rows)} ({', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''})"
                for reason, rows in self.by_reason.items()
            ]
            total = sum(map(len, self.by_reason.values()))
            raise UserError(
                "\n".join([f"{total} bad row(s):", *lines, "Mend them, or leave them out with `on_bad_row: skip`."])
            )
        return self.report()


@dataclass
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
        form: `Prompt`, `Demonstration` or `Preference`.

    Raises:
        UserError: a source is missing, empty or lacks a column; there are bad rows and `on_bad_row` is "error"; a side
            is empty.
    """
    if not recipe.train_dataset:
        raise UserError("train_dataset: expected at least one source, got none; name a file, a hub id or a generator.")
    bad = BadRows()
    train, train_sources = _load(recipe.train_dataset, recipe.seed, form, bad)
    evaluation, eval_sources = _load(recipe.eval_dataset, recipe.seed, form, bad)
    bad_rows = bad.settle(recipe.on_bad_row)
    eval_rows = [row for rows in evaluation for row in rows]
    before = sum(map(len, train))
    if recipe.eval_dataset:
        seen = {prompt for row in eval_rows for prompt in _prompts(row)}
        train = [[row for row in rows if seen.isdisjoint(_prompts(row))] for rows in train]
        dropped = before - sum(map(len, train))
    else:
        sides = [[_is_held_out(row, recipe) for row in rows] for rows in train]
        eval_rows = [row for rows, out in zip(train, sides, strict=True) for row, o in zip(rows, out, strict=True) if o]
        train = [
            [row for row, o in zip(rows, out, strict=True) if not o] for rows, out in zip(train, sides, strict=True)
        ]
        dropped = 0
    if recipe.max_eval_rows is not None:
        eval_rows = _sample(eval_rows, recipe.max_eval_rows, f"{recipe.seed} evaluation")
    train_rows = [
        row
        for number, (source, rows) in enumerate(zip(recipe.train_dataset, train, strict=True))
        for row in _weighted(rows, source.weight, f"{recipe.seed} weight {number}")
    ]
    if not train_rows:
        raise UserError(
            f"train_dataset: no training row is left of {before} ({dropped} have a prompt of eval_dataset); "
            "lower `eval_fraction`, raise `weight`, or give other data."
        )
    if not eval_rows and (recipe.eval_dataset or recipe.eval_fraction > 0):
        raise UserError(
            f"eval_dataset: no evaluation row; eval_fraction {recipe.eval_fraction} of {before} rows held out none. Raise "
            "`eval_fraction`, give an `eval_dataset`, or set `eval_fraction: 0` to train without evaluation."
        )
    report = {
        "sources": train_sources + eval_sources,
        "train_rows": len(train_rows),
        "evaluation_rows": len(eval_rows),
        "train_rows_dropped_for_evaluation_prompts": dropped,
        "bad_rows": bad_rows,
    }
    return Rows(train_rows, eval_rows, report)
