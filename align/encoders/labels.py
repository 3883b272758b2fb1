"""Label sets: what kind of problem the labels of the rows make, and the target of each row.

`problem_type` has transformers' names:

    single_label_classification   label: text, or ids from 0
    multi_label_classification    label: a list of them
    regression                    label: a number
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.rows import Labelled, label_kind
from align.errors import UserError, nearest

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
LABEL_KINDS = {  # kinds of label, as `label_kind` names them
    SINGLE: ("text", "whole numbers"),
    MULTI: ("lists of text", "lists of whole numbers"),
    REGRESSION: ("fractions", "whole numbers"),
}
SHOWN = 8  # labels that a message names


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The labels of a classifier.

    Attributes:
        names: in the order of ids. A regression has one, without meaning.
        ids: of each label as the rows have it.
        center: mean label of a regression's training rows.
        frequency: training rows with each label, in the order of `names`.
    """

    problem_type: str
    names: list[str]
    ids: dict[Any, int]
    center: float = 0.0
    frequency: list[int] = field(default_factory=list)

    def describe(self) -> str:
        """The labels in one line, the most frequent first, which shows imbalance."""
        if self.problem_type == REGRESSION:
            return f"mean label {self.center:.4g}"
        order = sorted(range(len(self.names)), key=lambda index: -self.frequency[index])
        shown = _first_few([f"{self.names[index]} ({self.frequency[index]})" for index in order])
        rarest = f"; the rarest has {min(self.frequency)}" if len(order) > SHOWN else ""
        return f"{len(self.names)} labels by training rows: {shown}{rarest}"

    def encode(self, row: Labelled) -> int | float | list[float]:
        """The row's target: an id, a number, or for each label 1 where the row has it and 0 elsewhere.

        Raises:
            UserError: a label that no training row has.
        """
        if self.problem_type == REGRESSION:
            return float(row.label)
        for label in _labels_of(row):
            if label not in self.ids:
                raise UserError(
                    f"{row.where}: label {label!r} of an evaluation row occurs in no training row; these have "
                    f"{_first_few(self.ids)}{nearest(str(label), map(str, self.ids)) or '.'} Correct it, or give training rows "
                    "that have it."
                )
        ids = [self.ids[label] for label in _labels_of(row)]
        if self.problem_type == SINGLE:
            return ids[0]
        return [float(index in ids) for index in range(len(self.names))]


def find_labels(training: Sequence[Labelled], evaluation: Sequence[Labelled], problem_type: str | None) -> LabelSet:
    """The labels of the training rows, checked against those of the evaluation rows.

    Args:
        problem_type: None to infer it from the labels.

    Raises:
        UserError: labels of several kinds or of a kind that does not fit `problem_type`, a label that training rows
            lack, or only one label.
    """
    kind, example = _common_kind([*training, *evaluation])
    if problem_type is None:  # whole numbers fit two, the first of which takes them as ids
        problem_type = next((name for name, kinds in LABEL_KINDS.items() if kind in kinds), MULTI)
    if kind not in LABEL_KINDS[problem_type]:
        raise UserError(
            f"problem_type: {problem_type} needs {' or '.join(LABEL_KINDS[problem_type])} as `label`, and the rows have "
            f"{kind} ({example.where}: {example.label!r}); change one of them."
        )
    known = {label for row in training for label in _labels_of(row)}
    if len(known) < 2:
        raise UserError(
            f"label: all {len(training)} training rows have the same label, {_first_few(known)}, so there is nothing to "
            "learn; give rows with other labels, or name another column under `columns:`."
        )
    if problem_type == REGRESSION:
        return LabelSet(problem_type, ["LABEL_0"], {}, math.fsum(row.label for row in training) / len(training))
    names, ids = _names_and_ids(known)
    counts = Counter(ids[label] for row in training for label in _labels_of(row))
    label_set = LabelSet(problem_type, names, ids, frequency=[counts[index] for index in range(len(names))])
    for row in evaluation:
        label_set.encode(row)
    return label_set


def _common_kind(rows: Sequence[Labelled]) -> tuple[str, Labelled]:
    """The kind of all labels, and the first row that has it. Whole numbers among fractions count as fractions."""
    first: dict[str, Labelled] = {}
    for row in rows:
        first.setdefault(label_kind(row.label), row)
    if len(first) > 1:
        first.pop("empty lists", None)
    if {*first} == {"whole numbers", "fractions"}:
        del first["whole numbers"]
    if len(first) > 1:
        shown = ", ".join(f"{kind} ({row.where}: {row.label!r})" for kind, row in first.items())
        raise UserError(f"label: expected one kind of label in all rows, got {shown}; correct the rows.")
    ((kind, row),) = first.items()
    return kind, row


def _names_and_ids(labels: set[Any]) -> tuple[list[str], dict[Any, int]]:
    """Names in the order of ids, and the id of each label: names in alphabetical order, whole numbers unchanged."""
    if any(isinstance(label, str) for label in labels):
        names = sorted(labels)
        return names, {name: index for index, name in enumerate(names)}
    if min(labels) < 0:
        raise UserError(
            f"label: expected ids from 0, got {min(labels)}; use names, or set problem_type: regression if it is a number."
        )
    if num_missing := max(labels) + 1 - len(labels):
        first = next(label for label in range(max(labels)) if label not in labels)
        raise UserError(
            f"label: ids go up to {max(labels)}, and {num_missing} of them occur in no training row, {first} for one; give "
            "training rows of each, or number the labels without gaps."
        )
    return [f"LABEL_{label}" for label in sorted(labels)], {label: label for label in labels}


def _labels_of(row: Labelled) -> list[Any]:
    """The row's labels; booleans become names."""
    labels = row.label if isinstance(row.label, list) else [row.label]
    return [str(label).lower() if isinstance(label, bool) else label for label in labels]


def _first_few(labels: Collection[Any]) -> str:
    shown = ", ".join(map(str, list(labels)[:SHOWN]))
    return shown + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")
