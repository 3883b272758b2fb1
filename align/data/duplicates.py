"""Rows that stand on both sides of the data, or nearly: found before training, and reported.

Two rows are exact duplicates when their texts are equal, case and spacing apart; near duplicates when at least 0.8 of
the 5-word sequences that either has are had by both (Jaccard index). 5 words and 0.8 are the setting of Lee et al.,
"Deduplicating training data makes language models better" (arXiv 2107.06499); there, MinHash finds the candidates, here
all are looked at, which is exact. One changed word is found in rows of about 50 words and more; rows under 5 words are
one sequence, and those written without spaces have hardly more, so among them only copies are found.
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

THRESHOLD = 0.8
SIZE = 5  # words of a sequence
FIRST = 5  # pairs that the report names
BATCH = 4096  # rows whose sequences are made at once
_CODE_BITS = 52  # of a sequence's code; the other 12 number the rows of a batch
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
Codes = NDArray[np.uint64]


def find_duplicates(training: Sequence[Row], evaluation: Sequence[Row]) -> dict[str, Any]:
    """Evaluation rows that training rows duplicate; nothing is dropped.

    Returns:
        JSON-able: `evaluation_rows`, `threshold`, and for `exact` and `near` the `count` of evaluation rows (each is in
        one of them at most) and the `first` few as [where it stands, where the training row stands, Jaccard index].
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
            for index in indexes[:FIRST]
        ]
        return {"count": len(indexes), "first": first}

    return {
        "evaluation_rows": len(evaluation),
        "threshold": THRESHOLD,
        "exact": described(exact),
        "near": described(near),
    }


def describe_duplicates(report: Mapping[str, Any]) -> str | None:
    """What a person should hear of `Rows.report`: one line, or None when no row is on both sides."""
    found = report.get("duplicates")
    if not found or not (total := found["exact"]["count"] + found["near"]["count"]):
        return None
    (mine, other, _) = (found["exact"]["first"] or found["near"]["first"])[0]
    return (
        f"{total} of {found['evaluation_rows']} evaluation rows stand in the training rows too ({found['exact']['count']} "
        f"exact, {found['near']['count']} near duplicates; {mine} is like {other}): what is measured on them is memory; "
        "take them out of one side."
    )


def row_text(row: Row) -> str:
    """What two rows are compared by: all that is said in the row, or the columns that its template reads.

    Not what the template writes around these: the same data through two templates is a duplicate, and other data through
    one template is none.
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
    """(index in evaluation, index in training, Jaccard index): the first near duplicate of each text that has one."""
    vocabulary: defaultdict[str, int] = defaultdict(count(1).__next__)
    mine = [codes for _, batch in _sequences(evaluation, vocabulary) for codes in batch]
    codes = np.concatenate([*mine, np.zeros(0, np.uint64)])
    order = np.argsort(codes, kind="stable")
    lengths = np.array([len(own) for own in mine], int)
    codes, owners = codes[order], np.repeat(np.arange(len(mine)), lengths)[order]  # who has each sequence
    found: dict[int, tuple[int, float]] = {}
    for first, batch in _sequences(training, vocabulary) if len(codes) else ():
        sizes = np.array([len(own) for own in batch])
        flat = np.concatenate(batch)
        known = codes[np.minimum(np.searchsorted(codes, flat), len(codes) - 1)] == flat
        shared = np.bincount(np.repeat(np.arange(len(batch)), sizes), known, minlength=len(batch))
        # A row of which less than the threshold is anywhere in the evaluation rows is like none of them.
        for row in map(int, np.flatnonzero((shared >= THRESHOLD * sizes) & (sizes > 0))):
            starts, ends = np.searchsorted(codes, batch[row]), np.searchsorted(codes, batch[row], "right")
            having = np.concatenate([owners[start:end] for start, end in zip(starts, ends, strict=True)])
            both = np.bincount(having, minlength=len(mine))
            similarity = both / (sizes[row] + lengths - both)
            for other in map(int, np.flatnonzero(similarity >= THRESHOLD)):
                found.setdefault(other, (first + row, float(similarity[other])))
    return [(other, *found[other]) for other in sorted(found)]


def _sequences(texts: Sequence[str], vocabulary: Mapping[str, int]) -> Iterator[tuple[int, list[Codes]]]:
    """(index of its first text, the codes of each text's word sequences, sorted, each once), batch by batch."""
    for first in range(0, len(texts), BATCH):
        words = [_WORD.findall(text.lower()) for text in texts[first : first + BATCH]]
        words = [row + [""] * (SIZE - len(row)) if row else row for row in words]
        owners = np.repeat(np.arange(len(words), dtype=np.uint64), [len(row) for row in words])
        ids = np.fromiter(map(vocabulary.__getitem__, chain.from_iterable(words)), np.uint64, len(owners))
        whole = (
            owners[: max(len(owners) - SIZE + 1, 0)] == owners[SIZE - 1 :]
        )  # sequences that end in the row they begin in
        codes: Codes = np.zeros(len(whole), np.uint64)
        for place in range(SIZE):
            codes = codes * _FACTOR + _mixed(ids[place : place + len(whole)])
        packed = owners[: len(whole)][whole] << _CODE_BITS | codes[whole] >> (64 - _CODE_BITS)
        packed.sort()  # numpy.unique is slower
        packed = packed[np.append(True, packed[1:] != packed[:-1])[: len(packed)]]
        ends = np.searchsorted(packed >> _CODE_BITS, np.arange(len(words) - 1, dtype=np.uint64), "right")
        yield first, np.split(packed & ((1 << _CODE_BITS) - 1), ends)


def _mixed(ids: Codes) -> Codes:
    """Numbers of words spread over 64 bits (the finaliser of SplitMix64)."""
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    ids = (ids ^ (ids >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ids ^ (ids >> np.uint64(31))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
