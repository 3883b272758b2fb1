"""Entity-level precision, recall and F1, as seqeval defines them, from counts of each row.

An entity is right if its first character, its last one and its type are those of a gold entity of the row.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.data.rows import Span
from align.encoders.alignment import Example, decode, meet
from align.encoders.tags import OUTSIDE, WORDS, TagSet
from align.evaluate.bootstrap import Floats, Measure, bootstrap_intervals

TYPE_COLUMNS = ["entity", "in training", "held out", "precision", "recall", "F1"]
RESAMPLES = 1000
WORD = re.compile(r"\w+|[^\w\s]")


def count_entities(types: Sequence[str], predicted: Sequence[Span], gold: Sequence[Span]) -> Floats:
    """Right, predicted and gold entities of each type in a row, [types, 3]."""
    counts = np.zeros((len(types), 3))
    index = {name: place for place, name in enumerate(types)}
    for column, spans in enumerate(({*predicted} & {*gold}, {*predicted}, {*gold})):
        for *_, name in spans:
            counts[index[name], column] += 1
    return counts


def entity_metrics(counts: Floats) -> dict[str, float]:
    """Metrics by name from counts [rows, types, 3].

    Precision, recall and F1 are over all entities together (micro), 0 where undefined, with a 95% bootstrap interval of F1
    over the rows; `macro_f1` is the mean over the types that are gold or predicted anywhere.
    """
    low, high = bootstrap_intervals(Measure(counts.sum(axis=1), _micro), RESAMPLES, 0)["f1"]
    by_type = counts.sum(axis=0)
    present = by_type[:, 1:].sum(axis=1) > 0
    f1 = [_micro(each)["f1"] for each in by_type[present]]
    macro = float(np.mean(f1)) if f1 else 0.0
    return {**_micro(counts.sum(axis=(0, 1))), "f1_low": low, "f1_high": high, "macro_f1": macro}


def _micro(counts: Floats) -> dict[str, float]:
    """Precision, recall and F1 of right, predicted and gold entities, [3]."""
    right, predicted, gold = counts.tolist()
    return {
        "precision": right / predicted if predicted else 0.0,
        "recall": right / gold if gold else 0.0,
        "f1": 2 * right / (predicted + gold) if predicted + gold else 0.0,
    }


def type_table(tag_set: TagSet, counts: Floats) -> list[list[Any]]:
    """A row for each type with the `TYPE_COLUMNS`, by decreasing frequency in training."""
    by_type = counts.sum(axis=0)
    rows = [
        [name, frequency, int(each[2]), *_micro(each).values()]
        for name, frequency, each in zip(tag_set.types, tag_set.frequency, by_type, strict=True)
    ]
    return sorted(rows, key=lambda row: -row[1])


def commonest_tags(tag_set: TagSet, training: Sequence[Example], evaluation: Sequence[Example]) -> Floats:
    """Counts [rows, types, 3] of the baseline: each word has its commonest tag in training, an unknown one O.

    Words of rows without words are runs of letters and digits, and each other character. Where every word has a tag, an
    unknown one gets the commonest.
    """
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in training:
        for word, label in zip(_words(example), _word_labels(example, tag_set.scheme), strict=True):
            seen[_said(example, word)][label] += 1
    every = sum(seen.values(), Counter[str]())
    unknown = every.most_common(1)[0][0] if tag_set.scheme == WORDS else OUTSIDE
    commonest = {word: counter.most_common(1)[0][0] for word, counter in seen.items()}
    counts = []
    for example in evaluation:
        labels = [commonest.get(_said(example, word), unknown) for word in _words(example)]
        predicted = decode(labels, _words(example), tag_set.scheme)
        counts.append(count_entities(tag_set.types, predicted, example.gold))
    return np.array(counts)


def _words(example: Example) -> Sequence[tuple[int, int]]:
    return example.row.words or [match.span() for match in WORD.finditer(example.row.text)]


def _said(example: Example, word: tuple[int, int]) -> str:
    return example.row.text[slice(*word)]


def _word_labels(example: Example, scheme: str) -> list[str]:
    """The label of each word: that of a span that it has a character in common with."""
    labels = []
    begun = None
    for word in _words(example):
        span = next((span for span in example.gold if meet(word, span[:2])), None)
        label = (
            OUTSIDE if span is None else span[2] if scheme == WORDS else f"{'I' if span is begun else 'B'}-{span[2]}"
        )
        labels.append(label)
        begun = span
    return labels
