"""Exact and near duplicates between training and evaluation rows, reported before training.

Two rows are exact duplicates if their texts are equal up to case and whitespace, and near duplicates if the Jaccard index
of their sets of word 5-grams is at least 0.8: the setting of Lee et al., "Deduplicating training data makes language
models better" (arXiv 2107.06499). They find candidates with MinHash; here the index of every pair with a common 5-gram
is computed exactly. A single changed word is tolerated in rows of about 50 words or more. Rows of fewer than 5 words, or
in scripts without spaces, have few 5-grams, so only copies of them are found.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.config.data_source import read_columns
from align.data.rows import Demonstration, Preference, Row, render_text
from align.data.templates import TEMPLATE

THRESHOLD = 0.8  # Jaccard index of near duplicates
NGRAM = 5  # words
MAX_REPORTED = 5  # pairs named in the report
BATCH = 4096  # rows hashed at once
_CODE_BITS = 52  # of an n-gram's hash; the other 12 bits hold the row's number in its batch
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
Codes = NDArray[np.uint64]


def find_duplicates(training: Sequence[Row], evaluation: Sequence[Row]) -> dict[str, Any]:
    """Find the evaluation rows that have a duplicate among the training rows; no row is dropped.

    Returns:
        JSON-able: `evaluation_rows`, `threshold`, and for `exact` and `near` the `count` of evaluation rows (each counts
        in at most one of them) and the `first` few as [place of the evaluation row, of the training row, Jaccard index].
    """
    texts = [row_text(row) for row in training]
    held_out = [row_text(row) for row in evaluation]
    places = {plain: index for index, plain in reversed(list(enumerate(map(_plain, texts))))}
    pairs: dict[int, tuple[int, float]] = {}
    for index, text in enumerate(held_out):
        if (other := places.get(_plain(text))) is not None:
            pairs[index] = other, 1.0
    exact = sorted(pairs)
    rest = [index for index in range(len(held_out)) if index not in pairs]
    for found, other, similarity in near_duplicates(texts, [held_out[index] for index in rest]):
        pairs[rest[found]] = other, similarity
    near = sorted(pairs.keys() - set(exact))

    def described(indexes: list[int]) -> dict[str, Any]:
        first = [
            [evaluation[index].where, training[pairs[index][0]].where, round(pairs[index][1], 3)]
            for index in indexes[:MAX_REPORTED]
        ]
        return {"count": len(indexes), "first": first}

    return {
        "evaluation_rows": len(evaluation),
        "threshold": THRESHOLD,
        "exact": described(exact),
        "near": described(near),
    }


def describe_duplicates(report: Mapping[str, Any]) -> str | None:
    """The duplicates in `Rows.report` in one line; None if there are none."""
    found = report.get("duplicates")
    if not found or not (total := found["exact"]["count"] + found["near"]["count"]):
        return None
    (mine, other, _) = (found["exact"]["first"] or found["near"]["first"])[0]
    return (
        f"evaluation rows with duplicates in the training rows: {total} of {found['evaluation_rows']} "
        f"({found['exact']['count']} exact, {found['near']['count']} near; {mine} is like {other}). Evaluating on them "
        "measures memorization; remove them from one of the two."
    )


def row_text(row: Row) -> str:
    """The text by which rows are compared: all of the row's text, or of a templated row the columns its template reads.

    A template's own words are left out: the same data under two templates is a duplicate, and different data under the
    same template is not.
    """
    if (template := row.extra.get(TEMPLATE)) is not None:
        names = set().union(*(read_columns(text) for text in template.values()))
        columns = row.extra if "row" in names else {name: row.extra[name] for name in names if name in row.extra}
        return "\n".join(str(columns[name]) for name in sorted(columns) if not name.startswith("_") and name != "task")
    if isinstance(row, Preference):
        return "\n".join(map(render_text, (row.prompt, row.chosen, row.rejected)))
    if isinstance(row, Demonstration):
        return f"{render_text(row.prompt)}\n{render_text(row.completion)}"
    return render_text(row.prompt)


def near_duplicates(training: Sequence[str], evaluation: Sequence[str]) -> list[tuple[int, int, float]]:
    """The first near duplicate of each evaluation text that has one: (its index, index in training, Jaccard index)."""
    vocabulary: defaultdict[str, int] = defaultdict(count(1).__next__)
    mine = [codes for _, batch in _ngram_hashes(evaluation, vocabulary) for codes in batch]
    codes = np.concatenate([*mine, np.zeros(0, np.uint64)])
    order = np.argsort(codes, kind="stable")
    lengths = np.array([len(own) for own in mine], int)
    codes, owners = codes[order], np.repeat(np.arange(len(mine)), lengths)[order]  # the text of each n-gram
    found: dict[int, tuple[int, float]] = {}
    for first, batch in _ngram_hashes(training, vocabulary) if len(codes) else ():
        sizes = np.array([len(own) for own in batch])
        flat = np.concatenate(batch)
        known = codes[np.minimum(np.searchsorted(codes, flat), len(codes) - 1)] == flat
        shared = np.bincount(np.repeat(np.arange(len(batch)), sizes), known, minlength=len(batch))
        # Jaccard index <= share of the row's n-grams that occur in any evaluation row.
        for row in map(int, np.flatnonzero((shared >= THRESHOLD * sizes) & (sizes > 0))):
            starts, ends = np.searchsorted(codes, batch[row]), np.searchsorted(codes, batch[row], "right")
            having = np.concatenate([owners[start:end] for start, end in zip(starts, ends, strict=True)])
            both = np.bincount(having, minlength=len(mine))
            similarity = both / (sizes[row] + lengths - both)
            for other in map(int, np.flatnonzero(similarity >= THRESHOLD)):
                found.setdefault(other, (first + row, float(similarity[other])))
    return [(other, *found[other]) for other in sorted(found)]


def _ngram_hashes(texts: Sequence[str], vocabulary: Mapping[str, int]) -> Iterator[tuple[int, list[Codes]]]:
    """Yield for each batch the index of its first text, and the sorted, unique n-gram hashes of each of its texts."""
    for first in range(0, len(texts), BATCH):
        words = [_WORD.findall(text.lower()) for text in texts[first : first + BATCH]]
        words = [row + [""] * (NGRAM - len(row)) if row else row for row in words]
        owners = np.repeat(np.arange(len(words), dtype=np.uint64), [len(row) for row in words])
        ids = np.fromiter(map(vocabulary.__getitem__, chain.from_iterable(words)), np.uint64, len(owners))
        # n-grams that end in the text they begin in
        inside = owners[: max(len(owners) - NGRAM + 1, 0)] == owners[NGRAM - 1 :]
        codes: Codes = np.zeros(len(inside), np.uint64)
        for place in range(NGRAM):
            codes = codes * _FACTOR + _mixed(ids[place : place + len(inside)])
        packed = owners[: len(inside)][inside] << _CODE_BITS | codes[inside] >> (64 - _CODE_BITS)
        packed.sort()  # numpy.unique is slower
        packed = packed[np.append(True, packed[1:] != packed[:-1])[: len(packed)]]
        ends = np.searchsorted(packed >> _CODE_BITS, np.arange(len(words) - 1, dtype=np.uint64), "right")
        yield first, np.split(packed & ((1 << _CODE_BITS) - 1), ends)


def _mixed(ids: Codes) -> Codes:
    """Word ids hashed to 64 bits with the finalizer of SplitMix64."""
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    ids = (ids ^ (ids >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ids ^ (ids >> np.uint64(31))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
