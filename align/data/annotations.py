"""Rows with annotations inside their texts: tagged words, labeled spans of characters, and answers in a passage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from align.data.rows import Question, Span, Tagged
from align.errors import BadRow

SPAN_COLUMNS = ("spans", "entities")
OFFSETS = (("start", "end"), ("start_offset", "end_offset"))  # names of a span's offsets; the second are doccano's


def read_tagged(values: Mapping[str, Any], where: str, columns: Sequence[str]) -> Tagged:
    """A row of `tokens` and `tags`, or of `text` and `spans`; words are joined by single spaces.

    Raises:
        BadRow: the row is not of that form.
    """
    extra = {name: value for name, value in values.items() if name not in columns}
    if "tokens" in columns:
        words, tags = values["tokens"], values["tags"]
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise BadRow("`tokens` is not a list of words")
        if not all(word.strip() for word in words):
            raise BadRow("`tokens` has an empty word")
        if not isinstance(tags, list) or {type(tag) for tag in tags} not in ({str}, {int}):
            raise BadRow("`tags` is not a list of names or of ids")
        if len(tags) != len(words):
            raise BadRow("`tokens` and `tags` differ in number")
        return Tagged(*join_words(words), tuple(tags), None, where, extra)
    text = _text(values, "text")
    name = next(name for name in SPAN_COLUMNS if name in columns)
    return Tagged(text, None, None, _spans(values[name], name, text), where, extra)


def join_words(words: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of words joined by single spaces, and the place of each word in it."""
    places, end = [], -1
    for word in words:
        places.append((end + 1, end + 1 + len(word)))
        end = places[-1][1]
    return " ".join(words), tuple(places)


def read_question(values: Mapping[str, Any], where: str) -> Question:
    """A row of `question`, `context` and `answers`, in the format of SQuAD: {text: [...], answer_start: [...]} or a list.

    A question without answers cannot be answered from its context.

    Raises:
        BadRow: the row is not of that form, or an answer does not stand at its offset.
    """
    extra = {name: value for name, value in values.items() if name not in ("question", "context", "answers")}
    question, context = _text(values, "question"), _text(values, "context")
    answers: list[tuple[int, str]] = []
    for each in _records(values["answers"], "answers", ("text", "answer_start")):
        text, start = (each.get("text"), each.get("answer_start")) if isinstance(each, Mapping) else (None, None)
        if not isinstance(text, str) or not text.strip():
            raise BadRow("`answers` has an answer without `text`")
        if not _is_offset(start):
            raise BadRow("`answers` has an `answer_start` that is not an offset in characters")
        if context[start : start + len(text)] != text:
            raise BadRow("`answers` has an answer whose text is not what the context has at its `answer_start`")
        answers.append((start, text))
    if answers and values.get("is_impossible"):
        raise BadRow("`is_impossible` in a row that has answers")
    return Question(question, context, tuple(answers), where, extra)


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is not text")
    if not value.strip():
        raise BadRow(f"empty `{name}`")
    return value


def _records(value: Any, name: str, keys: Sequence[str]) -> list[Any]:
    """A list of records; a mapping of lists, as Arrow has them, becomes one."""
    if isinstance(value, Mapping) and all(isinstance(value.get(key), list) for key in keys):
        columns = {key: each for key, each in value.items() if isinstance(each, list)}
        if len({len(each) for each in columns.values()}) > 1:
            raise BadRow(f"`{name}` has lists of different lengths")
        return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is neither a list nor a mapping of lists of {' and '.join(keys)}")
    return value


def _spans(value: Any, name: str, text: str) -> tuple[Span, ...]:
    """The spans of a text in their order, without white space at their ends.

    Each is {start, end, label}, with the label under `label` or, as one of a list, `labels`; or [start, end, label].
    """
    spans = []
    for each in _records(value, name, ("start", "end", "label")):
        start, end, label, said = _span(each, name)
        if not (_is_offset(start) and _is_offset(end)):
            raise BadRow(f"`{name}` has a span whose `start` or `end` is not an offset in characters")
        if not isinstance(label, str) or not label.strip():
            raise BadRow(f"`{name}` has a span without a `label` in text")
        if not start < end <= len(text):
            raise BadRow(f"`{name}` has a span that is empty or goes beyond the text")
        covered = text[start:end]
        if said is not None and said != covered:
            raise BadRow(f"`{name}` has a span whose `text` is not what its offsets cover")
        if not covered.strip():
            raise BadRow(f"`{name}` has a span of white space alone")
        start += len(covered) - len(covered.lstrip())
        spans.append((start, start + len(covered.strip()), label))
    spans.sort()
    if any(second[0] < first[1] for first, second in itertools.pairwise(spans)):
        raise BadRow(f"`{name}` has spans that overlap; each character has one label at most")
    return tuple(spans)


def _span(each: Any, name: str) -> tuple[Any, Any, Any, Any]:
    """Start, end, label, and the text that the span says it covers, or None."""
    if isinstance(each, list | tuple) and len(each) == 3:
        return *each, None
    if not isinstance(each, Mapping):
        raise BadRow(f"`{name}` is not a list of {{start, end, label}} or of [start, end, label]")
    start, end = next((names for names in OFFSETS if names[0] in each), OFFSETS[0])
    label, several = each.get("label"), each.get("labels")
    if label is None and isinstance(several, list) and len(several) == 1:
        label = several[0]
    return each.get(start), each.get(end), label, each.get("text")


def _is_offset(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
