"""Tag sets: how the tags of the rows mark entities, and the labels that the model learns.

Schemes of tags, found from all tags of the rows:

    IOB2    B-X I-X O            an entity begins with B-
    BILOU   B-X I-X L-X U-X O    its last word has L-, a single one U-
    IOBES   B-X I-X E-X S-X O    its last word has E-, a single one S-; with M- for I- it is BMES
    IO      X O                  words in a row with the same tag are an entity
    words   X                    every word has a tag of its own, such as a part of speech

Rows of `text` and `spans` name entities without tags. Whatever the scheme, the model learns IOB2, except for tags of words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from align.data.rows import BadRows, Span, Tagged
from align.encoders.labels import SHOWN
from align.errors import BadRow, UserError, first_few, nearest

OUTSIDE = "O"
WORDS, IO, SPANS = "words", "IO", "spans"
CLOSED = {"BILOU": "LU", "IOBES": "ES"}  # schemes that mark an entity's end: the letters of last and single words
SAME = {"M": "I", "L": "E", "U": "S"}  # letters that mean the same


@dataclass(frozen=True, slots=True)
class TagSet:
    """The labels of a token classifier.

    Attributes:
        scheme: of the rows' tags, or "spans".
        types: of entities, or the tags of words, in alphabetical order.
        frequency: entities of each type in the training rows.
        label_names: names of tags that are ids.
    """

    scheme: str
    types: list[str]
    frequency: list[int]
    label_names: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """Names of the model's labels in the order of their ids."""
        if self.scheme == WORDS:
            return self.types
        return [OUTSIDE, *(f"{mark}-{name}" for name in self.types for mark in "BI")]

    def describe(self) -> str:
        """The types in one line, the most frequent first, which shows imbalance."""
        order = sorted(range(len(self.types)), key=lambda index: -self.frequency[index])
        what = "tags of words" if self.scheme == WORDS else "types of entities"
        shown = ", ".join(f"{self.types[index]} ({self.frequency[index]})" for index in order[:SHOWN])
        rest = f" and {len(order) - SHOWN} more; the rarest has {min(self.frequency)}" if len(order) > SHOWN else ""
        return f"{self.scheme}, {len(self.types)} {what} by their number in training: {shown}{rest}"

    def spans_of(self, row: Tagged) -> list[Span]:
        """The entities of a row, or its words with their tags, as spans of characters.

        Raises:
            BadRow: the tags are no valid sequence in the scheme.
        """
        if row.spans is not None:
            return list(row.spans)
        assert row.words is not None
        found = entities(_names(row, self.label_names), self.scheme)
        return [(row.words[first][0], row.words[last][1], name) for first, last, name in found]


def find_tags(
    training: Sequence[Tagged], evaluation: Sequence[Tagged], label_names: Sequence[str], on_bad_row: str
) -> TagSet:
    """The tag set of the training rows, checked against the evaluation rows.

    Raises:
        UserError: tags of several schemes, ids without names, a type in the evaluation rows alone, nothing to learn, or
            invalid sequences and `on_bad_row` is "error".
    """
    rows = [*training, *evaluation]
    _check_names(rows, label_names)
    known: dict[str, str] = {}  # the first row that has each tag
    for row in rows:
        with suppress(BadRow):
            for name in _names(row, label_names) if row.tags is not None else ():
                known.setdefault(name, row.where)
    scheme = _scheme(known) if known else SPANS
    if scheme == WORDS and (other := next((row for row in rows if row.spans is not None), None)):
        raise UserError(
            f"tags: {next(iter(known.values()))} has a tag for each word without {OUTSIDE}, B- or I-, and {other.where} "
            "has spans; train on one of the two kinds."
        )
    bad = BadRows()
    counts: Counter[str] = Counter()
    tag_set = TagSet(scheme, [], [], tuple(label_names))
    for row in training:
        with bad.catch(row.where):
            counts.update(name for *_, name in tag_set.spans_of(row))
    types = sorted(counts)
    for row in evaluation:
        with bad.catch(row.where):
            for *_, name in tag_set.spans_of(row):
                if name not in counts:
                    raise UserError(
                        f"{row.where}: {name!r} of an evaluation row occurs in no training row; these have "
                        f"{first_few(types) or 'no entity'}{nearest(name, types) or '.'} Correct it, or give training rows that "
                        "have it."
                    )
    bad.raise_or_report(on_bad_row)
    if len(types) < (2 if scheme == WORDS else 1):
        raise UserError(
            f"tags: all {len(training)} training rows have {f'the tag {types[0]} alone' if types else 'no entity'}, so there is "
            "nothing to learn; give rows with others, or name another column under `columns:`."
        )
    return TagSet(scheme, types, [counts[name] for name in types], tuple(label_names))


def _check_names(rows: Sequence[Tagged], label_names: Sequence[str]) -> None:
    """Check that ids have names, and text has none."""
    first: dict[str, str] = {}
    for row in rows:
        kind = "spans" if row.tags is None else "ids" if isinstance(row.tags[0], int) else "text"
        first.setdefault(kind, row.where)
    if "ids" in first and not label_names:
        raise UserError(
            f"label_names: {first['ids']} has `tags` in ids; give their names in order, as in [O, B-PER, I-PER]."
        )
    if label_names and "ids" not in first:
        raise UserError("label_names: no row has `tags` in ids, so that it has no effect; leave it out.")


def _names(row: Tagged, label_names: Sequence[str]) -> list[str]:
    """The tags of the row's words by name.

    Raises:
        BadRow: an id without a name.
    """
    assert row.tags is not None
    if isinstance(row.tags[0], str):
        return list(row.tags)
    if not all(0 <= tag < len(label_names) for tag in row.tags):
        raise BadRow(f"`tags` has an id outside of 0 to {len(label_names) - 1}, the ids of `label_names`")
    return [label_names[tag] for tag in row.tags]


def _scheme(tags: dict[str, str]) -> str:
    """The scheme of all tags, each with the first row that has it."""
    marked = [tag for tag in tags if _is_marked(tag)]
    plain = [tag for tag in tags if tag not in marked and tag != OUTSIDE]
    if marked and plain:
        raise UserError(
            f"tags: {tags[marked[0]]} has {marked[0]!r}, and {tags[plain[0]]} has {plain[0]!r}, which says neither where an "
            f"entity begins nor {OUTSIDE}; write all tags in one scheme, IOB2, BILOU, IOBES, or names without marks."
        )
    if not marked:
        return IO if OUTSIDE in tags else WORDS
    letters = {tag[0] for tag in marked}
    closed = [scheme for scheme, ends in CLOSED.items() if letters & {*ends}]
    if len(closed) > 1:
        raise UserError(
            f"tags: they have the marks {', '.join(sorted(letters))}, of both {' and '.join(closed)}; write all in one."
        )
    return closed[0] if closed else "IOB2"


def _is_marked(tag: str) -> bool:
    return len(tag) > 2 and tag[1] == "-" and tag[0] in "BIMESLU"


def entities(tags: Sequence[str], scheme: str) -> list[tuple[int, int, str]]:
    """(first word, last word, type) of each entity that the tags of a row mark.

    Raises:
        BadRow: an entity that does not begin or end as the scheme says.
    """
    if scheme == WORDS:
        return [(place, place, tag) for place, tag in enumerate(tags)]
    if scheme == IO:
        runs = [[*run] for _, run in groupby(enumerate(tags), key=lambda each: each[1])]
        return [(run[0][0], run[-1][0], run[0][1]) for run in runs if run[0][1] != OUTSIDE]
    found: list[tuple[int, int, str]] = []
    begun: tuple[int, str] | None = None  # the entity that is not over yet: its first word and its type
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, name = (OUTSIDE, "") if tag == OUTSIDE else (SAME.get(tag[0], tag[0]), tag[2:])
        if letter in "IE":
            if begun is None or begun[1] != name:
                raise BadRow("`tags`: a word inside an entity, such as I-, after none of its type; begin each with B-")
            if letter == "E":
                found.append((begun[0], place, name))
                begun = None
            continue
        if begun is not None:
            if scheme in CLOSED:
                raise BadRow(f"`tags`: an entity without its last word, {CLOSED[scheme][0]}-, as {scheme} has it")
            found.append((begun[0], place - 1, begun[1]))
        begun = (place, name) if letter == "B" else None
        if letter == "S":
            found.append((place, place, name))
    return found
