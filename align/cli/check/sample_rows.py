"""Rows as `align check` shows them: the first one with the tokens that matter marked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.data.templates import TASK, TEMPLATE
from align.encoders.labels import LabelSet
from align.encoders.tags import TagSet
from align.models.context_length import check_rows_fit
from align.terminal import printable

SAMPLED_ROWS = 512  # training rows that are tokenized, and evaluation rows
SHOWN_ROWS = 6  # sample rows, one of each template
SHOWN = 400  # characters of each stretch of the sample row


@dataclass(frozen=True, slots=True)
class Start:
    """The starting point of a stage: configuration and tokenizer of its main model, and of the others by role."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: bool = False
    others: dict[str, PretrainedConfig] = field(default_factory=dict)
    adapters: dict[str, str] = field(
        default_factory=dict
    )  # folders of those on the main model's frozen weights, by role
    labels: LabelSet | None = None  # of a classifier
    tags: TagSet | None = None  # of a token classifier
    notes: Sequence[str] = ()  # further lines about the models


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokenized rows: the first one for display, and the lengths of all."""

    shown: dict[str, tuple[list[int], list[bool]]]  # by name: token ids, and which of them are marked
    note: str  # what the marks mean
    sequences: Sequence[list[int]]  # token ids of all rows
    bad: dict[str, dict[str, Any]]  # bad rows by reason


def sample_lines(
    rows: Sequence[Any], start: Start, tokenize: Callable[[Sequence[Any]], Sample]
) -> tuple[list[Text], int, list[int]]:
    """The first row (of each template) as the model will see it, the tokens that matter marked, and how long rows are.

    Returns:
        Lines, the number of rows that were tokenized, and the tokens of each sequence that they make.

    Raises:
        UserError: rows that cannot be tokenized, or are longer than the model can read.
    """
    kinds: dict[str, list[Any]] = {}
    for row in rows:
        template = row.extra.get(TEMPLATE)
        kinds.setdefault(json.dumps([row.extra[TASK], template]) if template else "", []).append(row)
    groups = [some[: SAMPLED_ROWS // min(len(kinds), SHOWN_ROWS)] for some in kinds.values()][:SHOWN_ROWS]
    lines: list[Text] = []
    sizes: list[int] = []
    skipped: Counter[str] = Counter()
    for some in groups:
        sample = tokenize(some)
        check_rows_fit(sample.sequences, start.config)
        sizes += map(len, sample.sequences)
        skipped.update({reason: entry["count"] for reason, entry in sample.bad.items()})
        task = f"{some[0].extra[TASK]}, " if TEMPLATE in some[0].extra else ""
        lines += [
            Text(f"  {task}{name}: ", style="bold") + marked(start.tokenizer, *tokens)
            for name, tokens in sample.shown.items()
        ]
    longest = f"at most {max(sizes)} tokens in the first {sum(map(len, groups))} rows"
    longest += f" of {len(groups)} of {len(kinds)} templates" if len(kinds) > len(groups) else ""
    without = "".join(f"; {count} of them skipped: {reason}" for reason, count in skipped.items())
    return [*lines, Text(f"  ({sample.note}; {longest}{without})", style="dim")], sum(map(len, groups)), sizes


def evaluation_line(rows: Sequence[Any], start: Start, tokenize: Callable[[Sequence[Any]], Sample]) -> str:
    """How long the first evaluation rows are, and how many are skipped.

    Raises:
        UserError: as `sample_lines`.
    """
    rows = rows[:SAMPLED_ROWS]
    sample = tokenize(rows)
    check_rows_fit(sample.sequences, start.config)
    skipped = "".join(f"; {entry['count']} of them skipped: {reason}" for reason, entry in sample.bad.items())
    return f"evaluation rows: at most {max(map(len, sample.sequences))} tokens in the first {len(rows)}{skipped}"


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marks: Sequence[bool]) -> Text:
    """Tokens as text, in stretches: marked ones in brackets, and green on a terminal."""
    text = Text()
    begin = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and marks[end] == marks[begin]:
            continue
        # Decoded from the start, because a token alone may lose its space.
        before = tokenizer.decode(list(ids[:begin]), clean_up_tokenization_spaces=False)
        piece = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))[len(before) :]
        if len(piece) > SHOWN:
            piece = f"{piece[: SHOWN // 2]} [...] {piece[-SHOWN // 2 :]}"
        piece = printable(piece)
        text.append(f"⟦{piece}⟧" if marks[begin] else piece, style="green" if marks[begin] else "")
        begin = end
    return text
