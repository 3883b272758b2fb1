"""Questions and their passages in overlapping windows, and the answers that a model finds in them.

A window is the question and as much of the passage as fits into `max_length` tokens; the next begins so that both have
`doc_stride` tokens of the passage in common. Its target is the first of the row's answers that lies in it whole, or, where
none does, its first token (that of BERT's [CLS]), which stands for no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.rows import BadRows, Question
from align.encoders.alignment import token_places
from align.encoders.tokenize import in_memory
from align.errors import BadRow, UserError

NO_ANSWER = 0  # the token that stands for it
NBEST = 20  # answers among which the probability of the best is computed, as in transformers' examples


@dataclass(frozen=True, slots=True)
class Window:
    """One window: its question's number, and the characters of the passage that each token covers, None for others."""

    question: int
    places: list[tuple[int, int] | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that a model may give: characters of the passage, and the sum of the logits of both ends."""

    score: float
    start: int
    end: int


def encode_windows(
    tokenizer: PreTrainedTokenizerBase, question: str, context: str, max_length: int, doc_stride: int
) -> list[tuple[dict[str, list[int]], list[tuple[int, int] | None]]]:
    """The model's inputs, and the place in the passage of each token, for each window.

    Raises:
        BadRow: the question leaves no room.
    """
    question = question.strip()
    room = max_length - len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    if room - tokenizer.num_special_tokens_to_add(pair=True) <= doc_stride:
        raise BadRow("the question leaves no room for more than `doc_stride` tokens of the passage in `max_length`")
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    windows = []
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    for number, offsets in enumerate(encoded["offset_mapping"]):
        of = encoded.sequence_ids(number)
        found = token_places(context, offsets)
        places = [each if part == 1 and each[0] < each[1] else None for each, part in zip(found, of, strict=True)]
        windows.append(({name: encoded[name][number] for name in names}, places))
    tokenizer.backend_tokenizer.no_truncation()  # which `save_pretrained` would write
    return windows


def target(places: Sequence[tuple[int, int] | None], answers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """First and last token of the first answer that the window holds whole, or `NO_ANSWER` twice."""
    there = [(index, place) for index, place in enumerate(places) if place is not None]
    for start, text in answers:
        first = start + len(text) - len(text.lstrip())
        last = first + len(text.strip())
        inside = [index for index, place in there if place[0] < last and first < place[1]]
        if inside and there[0][1][0] <= first and last <= there[-1][1][1]:
            return inside[0], inside[-1]
    return NO_ANSWER, NO_ANSWER


def tokenize_questions(
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    doc_stride: int,
    on_bad_row: str,
) -> tuple[Dataset, list[Window], list[Question], dict[str, Any]]:
    """`input_ids`, `labels` (first and last token of the answer), `weight` (1) and `row` (the window's number) of each window.

    Returns:
        The data set, the windows by their numbers, the questions by theirs, and the bad rows by reason.

    Raises:
        UserError: there are bad rows and `on_bad_row` is "error"; no row is left.
    """
    bad = BadRows()
    windows: list[Window] = []
    questions: list[Question] = []

    def records() -> Iterator[dict[str, Any]]:
        for row in rows:
            with bad.catch(row.where):
                found = encode_windows(tokenizer, row.question, row.context, max_length, doc_stride)
                targets = [target(places, row.answers) for _, places in found]
                if row.answers and all(each == (NO_ANSWER, NO_ANSWER) for each in targets):
                    raise BadRow("no window holds an answer whole; raise `doc_stride` or `max_length`")
                for (inputs, places), labels in zip(found, targets, strict=True):
                    windows.append(Window(len(questions), places))
                    yield {**inputs, "labels": labels, "weight": 1, "row": len(windows) - 1}
                questions.append(row)

    integers = List(Value("int32"))
    features: dict[str, Any] = {"input_ids": integers, "labels": List(Value("int64"))}
    if "token_type_ids" in tokenizer.model_input_names:
        features["token_type_ids"] = integers
    dataset = in_memory(records(), features | {"weight": Value("int32"), "row": Value("int64")})
    report = bad.raise_or_report(on_bad_row)
    if not dataset:
        raise UserError(
            f"none of {len(rows)} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    return dataset, windows, questions, report


def best_answers(
    logits: Tensor, places: Sequence[tuple[int, int] | None], max_answer_length: int, count: int = 1
) -> list[Candidate]:
    """The `count` best answers of a window, the best first: every first and last token within `max_answer_length` is tried.

    Args:
        logits: of first and last token, [S, 2] float32.
    """
    tokens = [index for index, place in enumerate(places) if place is not None]
    if not tokens:
        return []
    start, end = logits[tokens, 0].double(), logits[tokens, 1].double()
    order = torch.tensor(tokens, device=logits.device)
    length = order[None, :] - order[:, None] + 1
    scores = (start[:, None] + end[None, :]).masked_fill((length < 1) | (length > max_answer_length), -torch.inf)
    values, indexes = scores.flatten().topk(min(count, scores.numel()))
    found = []
    for score, index in zip(values.tolist(), indexes.tolist(), strict=True):
        first, last = places[tokens[index // len(tokens)]], places[tokens[index % len(tokens)]]
        if score > -torch.inf and first is not None and last is not None:
            found.append(Candidate(score, first[0], last[1]))
    return found


def null_score(logits: Tensor) -> float:
    """The score of no answer in a window, from logits [S, 2]."""
    return float(logits[NO_ANSWER].double().sum())
