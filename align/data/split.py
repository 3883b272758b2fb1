"""Splits by a hash of the prompt, so that no prompt is on both sides: training and evaluation rows, a reward's and its judge's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from align.data.rows import Demonstration, Row, canonical
from align.data.templates import RENDERINGS
from align.errors import UserError

WORD = re.compile(r"\w+")

AnyRow = TypeVar("AnyRow", bound=Row)


class EmptySplit(UserError):
    """No row is left to train on, or none to evaluate on. Of a run that is resumed, changed rows may be the reason.

    Attributes:
        report: of the rows, as in `align.data.load.Rows`; None if they are not those of `train_dataset`.
    """

    report: Mapping[str, Any] | None = None


class NoHeldOutRows(EmptySplit):
    """`eval_fraction` of the prompts came to none."""


def is_held_out(row: Row, eval_fraction: float, seed: int) -> bool:
    """Whether the row is for evaluation. Depends on its opening and the seed alone, not on the other rows."""
    return _place(_opening(row), seed) < eval_fraction * 2**64


def is_for_judge(row: Row) -> bool:
    """Whether a training row is in the judge's half, which is the same for every seed.

    Openings that are equal but for case, white space and punctuation are in one half.
    """
    return (
        _place([(role, " ".join(WORD.findall(content.casefold()))) for role, content in _opening(row)], "judge") < 2**63
    )


def _opening(row: Row) -> list[tuple[str, str]]:
    """The prompt of the row, of a dialogue up to its first user turn."""
    turns = _prompt_turns(row)
    return turns[: 1 + [role for role, _ in turns].index("user")]


def _place(opening: list[tuple[str, str]], salt: int | str) -> int:
    """A number below 2**64 that depends on these alone."""
    digest = hashlib.sha256(json.dumps([salt, opening]).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def prompts_of(rows: Sequence[Row]) -> set[str]:
    """Every prompt to which one of the rows trains a response, as JSON."""
    return {prompt for row in rows for prompt in _prompts(row)}


def without_prompts(rows: Sequence[AnyRow], prompts: set[str]) -> list[AnyRow]:
    """The rows that train no response to any of the prompts."""
    return [row for row in rows if prompts.isdisjoint(_prompts(row))]


def _prompt_turns(row: Row) -> list[tuple[str, str]]:
    """The prompt as (role, content) pairs; of plain text, the text itself."""
    return canonical(row.completion if isinstance(row, Demonstration) and not row.prompt else row.prompt)


def _prompts(row: Row) -> list[str]:
    """The prompt of each assistant turn that the row trains, as each of the recipe's templates writes it."""
    found = []
    for written in (row, *row.extra.get(RENDERINGS, ())):
        turns = _prompt_turns(written)
        earlier = written.trained if isinstance(written, Demonstration) else []
        found += [json.dumps(turns[:end]) for end in (*earlier, len(turns))]
    return found
