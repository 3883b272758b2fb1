"""From labeled spans of a text to labels of its tokens, and back.

Every token that covers a character of a span has its label, B- the first of them and I- the others, also those inside a
word; other tokens have O. Special tokens, and tokens of white space alone, have none (-100). Predictions are read where
the gold entities can be: of rows with words at the first token of each word, of other rows at every token.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from align.data.rows import BadRows, Span, Tagged
from align.data.tokenize import IGNORE_INDEX
from align.encoders.tags import OUTSIDE, WORDS, TagSet
from align.encoders.tokenize import in_memory
from align.errors import BadRow, UserError


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its gold spans, and where predictions of them are read."""

    row: Tagged
    gold: list[Span]
    places: list[int]  # of the tokens whose predicted labels are read
    units: list[tuple[int, int]]  # characters that each of them stands for: its word, or what the token covers
    split: int  # gold spans of which an end lies inside a token, so that they cannot be predicted exactly


def check_fast(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Check that the tokenizer knows the characters of its tokens.

    Raises:
        UserError: it is a slow one, in Python.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"model_name_or_path: {path}: its tokenizer ({type(tokenizer).__name__}) is a slow one, in Python, which does not say "
            "which characters a token stands for; save a fast one (tokenizer.json) in the folder, or name another model."
        )


def encode_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, special tokens included, and the characters of each, as `token_places` has them."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], token_places(text, encoded["offset_mapping"])


def token_places(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters of each token, without white space at their ends, and with the marks on their last letter.

    Tokens that stand for no character, or for white space alone, have an empty place. Marks are accents and vowel signs,
    which some tokenizers drop as tokens, though they belong to the letter.
    """
    places = []
    for start, end in offsets:
        covered = text[start:end]
        start += len(covered) - len(covered.lstrip())
        end = start + len(covered.strip())
        while start < end < len(text) and unicodedata.category(text[end])[0] == "M":
            end += 1
        places.append((start, end))
    return places


def align(row: Tagged, gold: list[Span], offsets: Sequence[tuple[int, int]], scheme: str) -> tuple[list[str], Example]:
    """The label of each token ("" for none), and how predictions are read back.

    Raises:
        BadRow: a span without a token, or tokens that two spans or two words share.
    """
    labels = [OUTSIDE if start < end else "" for start, end in offsets]
    tokens = [place for place, label in enumerate(labels) if label]
    ends = [offsets[place][1] for place in tokens]

    def covering(start: int, end: int) -> list[int]:
        """The tokens that have a character in common with a place."""
        first = bisect_right(ends, start)
        return [*takewhile(lambda place: offsets[place][0] < end, tokens[first:])]

    split = 0
    for start, end, name in gold:
        inside = covering(start, end)
        if not inside:
            raise BadRow("a labeled span has no token: the tokenizer drops its characters")
        if any(labels[place] != OUTSIDE for place in inside):
            raise BadRow("two labeled spans share a token of this tokenizer")
        split += row.words is None and (offsets[inside[0]][0], offsets[inside[-1]][1]) != (start, end)
        for number, place in enumerate(inside):
            labels[place] = name if scheme == WORDS else f"{'I' if number else 'B'}-{name}"
    if row.words is None:
        return labels, Example(row, gold, tokens, [offsets[place] for place in tokens], split)
    places: list[int] = []
    units: list[tuple[int, int]] = []
    for word in row.words:
        first = covering(*word)[:1]
        if first and first == places[-1:]:
            raise BadRow("two words share a token of this tokenizer")
        if first:  # words that the tokenizer drops, such as control characters, are no end of an entity
            places.append(first[0])
            units.append(word)
    return labels, Example(row, gold, places, units, split)


def meet(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two places have a character in common."""
    return max(first[0], second[0]) < min(first[1], second[1])


def decode(labels: Sequence[str], units: Sequence[tuple[int, int]], scheme: str) -> list[Span]:
    """The spans that predicted labels mark, read as seqeval reads them: an I- after none of its type begins an entity."""
    if scheme == WORDS:
        return [(start, end, label) for (start, end), label in zip(units, labels, strict=True)]
    from seqeval.metrics.sequence_labeling import get_entities

    return [(units[first][0], units[last][1], name) for name, first, last in get_entities(list(labels))]


def tokenize_tagged(
    rows: Sequence[Tagged], tokenizer: PreTrainedTokenizerBase, tag_set: TagSet, *, max_length: int, on_bad_row: str
) -> tuple[Dataset, list[Example], dict[str, Any]]:
    """`input_ids`, `labels` (-100 for none), `weight` (tokens with a label) and `row`, the examples by `row`, and the bad rows.

    Raises:
        UserError: there are bad rows and `on_bad_row` is "error"; no row is left.
    """
    bad = BadRows()
    limit = min(max_length, tokenizer.model_max_length)
    name = "`max_length`" if limit == max_length else "the tokenizer's model_max_length"
    ids_of = {label: index for index, label in enumerate(tag_set.labels)} | {"": IGNORE_INDEX}
    examples: list[Example] = []

    def records() -> Iterator[dict[str, Any]]:
        for row in rows:
            with bad.catch(row.where):
                ids, offsets = encode_offsets(tokenizer, row.text)
                if len(ids) > limit:
                    raise BadRow(f"longer than {limit} tokens ({name})")
                labels, example = align(row, tag_set.spans_of(row), offsets, tag_set.scheme)
                if not example.places:
                    raise BadRow("no token has a label: the tokenizer drops all characters")
                examples.append(example)
                yield {
                    "input_ids": ids,
                    "labels": [ids_of[label] for label in labels],
                    "weight": sum(label != "" for label in labels),
                    "row": len(examples) - 1,
                }

    features = {"input_ids": List(Value("int32")), "labels": List(Value("int64"))}
    dataset = in_memory(records(), features | {"weight": Value("int32"), "row": Value("int64")})
    report = bad.raise_or_report(on_bad_row)
    if not dataset:
        raise UserError(
            f"none of {len(rows)} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    return dataset, examples, report


def describe_split(examples: Sequence[Example]) -> str | None:
    """How many gold spans cannot be predicted exactly; None if all can."""
    split, total = sum(each.split for each in examples), sum(len(each.gold) for each in examples)
    if not split:
        return None
    return (
        f"{split} of {total} labeled spans begin or end inside a token, so that the whole token has their label, and none of them "
        "can be predicted exactly"
    )


def describe_held_out(examples: Sequence[Example]) -> str | None:
    """That no evaluation row has an entity, so that nothing is measured; None if one has."""
    if not examples or any(each.gold for each in examples):
        return None
    return (
        f"none of the {len(examples)} evaluation rows has an entity, so that precision, recall and F1 are 0 whatever is predicted; "
        "raise eval_fraction, or give an eval_dataset"
    )
