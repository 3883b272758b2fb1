"""What the labels of a classifier mean: their ids, the loss that they have, and how right the model is about them.

Every measure comes from counts that are sums over rows, so that it is exact however the rows fall into batches and
ranks. `problem_type` has transformers' names:

    single_label_classification   label: text, or ids from 0     cross-entropy
    multi_label_classification    label: a list of them           binary cross-entropy, mean over the labels
    regression                    label: a number                 squared error
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from align.config import UserError
from align.evaluation import wilson_interval
from align.rows import Labelled, label_kind
from align.strict import nearest

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
FITTING = {  # kinds of label, as `label_kind` names them
    SINGLE: ("text", "whole numbers"),
    MULTI: ("lists of text", "lists of whole numbers"),
    REGRESSION: ("fractions", "whole numbers"),
}


@dataclass(frozen=True, slots=True)
class Labels:
    """The label set of a classifier. `names` are in the order of their ids; a regression has one, which says nothing.

    `center` is the mean label of a regression's training rows: counts are taken from there, where they lose no digits.
    """

    problem_type: str
    names: list[str]
    ids: dict[Any, int]
    center: float = 0.0

    def describe(self) -> str:
        """The label set in one line."""
        if self.problem_type == REGRESSION:
            return f"mean label {self.center:.4g}"
        return f"{len(self.names)} labels, {_some(self.names)}"

    def encode(self, row: Labelled) -> int | float | list[float]:
        """The label as the loss takes it: an id, a number, or 0 and 1 for each label.

        Raises:
            UserError: a label that no training row has.
        """
        if self.problem_type == REGRESSION:
            return float(row.label)
        for label in _each(row):
            if label not in self.ids:
                raise UserError(
                    f"{row.where}: label {label!r} of an evaluation row occurs in no training row; these have "
                    f"{_some(self.ids)}{nearest(str(label), map(str, self.ids))}. Mend it, or give training rows that have it."
                )
        places = [self.ids[label] for label in _each(row)]
        if self.problem_type == SINGLE:
            return places[0]
        return [float(place in places) for place in range(len(self.names))]

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row, [B] float32, from logits [B, labels] and `encode`d targets [B] or [B, labels]."""
        if self.problem_type == SINGLE:
            return cross_entropy(logits, targets, reduction="none")
        if self.problem_type == MULTI:
            return binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        return (logits[:, 0] - targets) ** 2

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether each row is wholly right, [B]; for a regression its squared error."""
        if self.problem_type == SINGLE:
            return logits.argmax(dim=1) == targets
        if self.problem_type == MULTI:
            return ((logits > 0) == (targets > 0)).all(dim=1)
        return self.losses(logits, targets)

    def counts(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Sums over rows, float64, from which `summary` has its measures; `weight` [B] is 0 for rows that do not count.

        Single: rows by label and prediction [L, L]. Multi: rows with each label that are found, missed, or said to have
        it wrongly [3, L]. Regression: number, sums and products of label and prediction, less `center` [6].
        """
        weight = weight.double()[:, None]
        if self.problem_type == SINGLE:
            size = len(self.names)
            true, said = one_hot(targets, size).double(), one_hot(logits.argmax(dim=1), size).double()
            return (true * weight).T @ said
        if self.problem_type == MULTI:
            is_true, is_said = targets > 0, logits > 0
            found, missed, wrong = is_true & is_said, is_true & ~is_said, is_said & ~is_true
            return (torch.stack([found, missed, wrong]) * weight).sum(dim=1)
        x, y = targets.double() - self.center, logits[:, 0].double() - self.center
        return (torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]) * weight[:, 0]).sum(dim=1)

    def summary(self, counts: Tensor, correct: float, rows: int) -> dict[str, float]:
        """Measures by name from the sums of `counts` and `correct` over so many rows.

        Macro F1 is the mean over labels of 2 found / (2 found + missed + wrong), as in scikit-learn: single labels that
        nobody has and nobody is said to have are left out, multiple ones count as 0. Pearson's correlation is 0 where
        one side is constant.
        """
        if self.problem_type == REGRESSION:
            _, x, y, xx, yy, xy = counts.tolist()
            of_x, of_y = xx - x * x / rows, yy - y * y / rows
            constant = of_x <= 1e-12 * xx or of_y <= 1e-12 * yy  # but for rounding
            return {"mse": correct / rows, "pearson": 0.0 if constant else (xy - x * y / rows) / math.sqrt(of_x * of_y)}
        low, high = wilson_interval(correct, rows)
        measures = {"accuracy": correct / rows, "accuracy_low": low, "accuracy_high": high}
        if self.problem_type == SINGLE:
            found = counts.diagonal()
            missed, wrong = counts.sum(dim=1) - found, counts.sum(dim=0) - found
            there = found + missed + wrong > 0
        else:
            found, missed, wrong = counts
            there = torch.ones_like(found, dtype=torch.bool)
            total = 2 * found.sum() + missed.sum() + wrong.sum()
            measures["micro_f1"] = float(2 * found.sum() / total.clamp(min=1))
        f1 = 2 * found / (2 * found + missed + wrong).clamp(min=1)
        return {**measures, "macro_f1": float(f1[there].mean())}

    def baseline(self, training: Sequence[Any], evaluation: Sequence[Any]) -> dict[str, float]:
        """Measures of always saying what is most frequent among the encoded training labels (a regression: their mean)."""
        targets = torch.tensor(evaluation)
        if self.problem_type == REGRESSION:
            said = torch.tensor([self.center])
        elif self.problem_type == MULTI:
            said = torch.tensor(Counter(map(tuple, training)).most_common(1)[0][0]) - 0.5
        else:
            said = one_hot(torch.tensor(Counter(training).most_common(1)[0][0]), len(self.names)).float()
        logits = said.expand(len(targets), -1)
        counts = self.counts(logits, targets, torch.ones(len(targets)))
        return self.summary(counts, float(self.correct(logits, targets).double().sum()), len(targets))


def find_labels(training: Sequence[Labelled], evaluation: Sequence[Labelled], problem_type: str | None) -> Labels:
    """The labels of the training rows, checked against the evaluation rows.

    Args:
        problem_type: what the recipe says; None to tell it from the labels.

    Raises:
        UserError: labels of several kinds, of another kind than the recipe says, a label that training rows lack, or
            nothing to tell apart.
    """
    kind, example = _one_kind([*training, *evaluation])
    if problem_type is None:  # whole numbers fit two, of which ids come first
        problem_type = next((name for name, kinds in FITTING.items() if kind in kinds), MULTI)
    if kind not in FITTING[problem_type]:
        raise UserError(
            f"problem_type: {problem_type} needs {' or '.join(FITTING[problem_type])} as `label`, and the rows have {kind} "
            f"({example.where}: {example.label!r}); change one of them."
        )
    known = {label for row in training for label in _each(row)}
    if len(known) < 2:
        raise UserError(
            f"label: all {len(training)} training rows have the same, {_some(known)}, so there is nothing to tell apart; give "
            "rows with other labels, or name another column under `columns:`."
        )
    if problem_type == REGRESSION:
        return Labels(problem_type, ["LABEL_0"], {}, math.fsum(row.label for row in training) / len(training))
    labels = Labels(problem_type, *_named(known))
    for row in evaluation:
        labels.encode(row)
    return labels


def _one_kind(rows: Sequence[Labelled]) -> tuple[str, Labelled]:
    """The kind that all labels have, and the first row that has it. Whole numbers among fractions are fractions."""
    first: dict[str, Labelled] = {}
    for row in rows:
        first.setdefault(label_kind(row.label), row)
    if len(first) > 1:
        first.pop("empty lists", None)
    if {*first} == {"whole numbers", "fractions"}:
        del first["whole numbers"]
    if len(first) > 1:
        shown = ", ".join(f"{kind} ({row.where}: {row.label!r})" for kind, row in first.items())
        raise UserError(f"label: expected one kind of label in all rows, got {shown}; mend the rows.")
    ((kind, row),) = first.items()
    return kind, row


def _named(known: set[Any]) -> tuple[list[str], dict[Any, int]]:
    """Names in the order of ids, and the id of each label: names by the alphabet, whole numbers as they are."""
    if any(isinstance(label, str) for label in known):
        names = sorted(known)
        return names, {name: place for place, name in enumerate(names)}
    if min(known) < 0:
        raise UserError(
            f"label: expected ids from 0, got {min(known)}; write names, or set problem_type: regression if it is a number."
        )
    if lacking := max(known) + 1 - len(known):
        first = next(label for label in range(max(known)) if label not in known)
        raise UserError(
            f"label: ids go up to {max(known)}, and {lacking} of them occur in no training row, {first} for one; give training "
            "rows of each, or number the labels without gaps."
        )
    return [f"LABEL_{label}" for label in sorted(known)], {label: label for label in known}


def _each(row: Labelled) -> list[Any]:
    """The row's labels; true and false are names."""
    labels = row.label if isinstance(row.label, list) else [row.label]
    return [str(label).lower() if isinstance(label, bool) else label for label in labels]


def _some(labels: Collection[Any]) -> str:
    shown = ", ".join(map(str, list(labels)[:8]))
    return shown + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
