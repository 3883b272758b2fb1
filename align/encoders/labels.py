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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from align.data.rows import Labelled, label_kind
from align.errors import UserError, nearest
from align.evaluate.statistics import wilson_interval

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
FITTING = {  # kinds of label, as `label_kind` names them
    SINGLE: ("text", "whole numbers"),
    MULTI: ("lists of text", "lists of whole numbers"),
    REGRESSION: ("fractions", "whole numbers"),
}
LABEL_COLUMNS = ["label", "training rows", "held-out rows", "precision", "recall", "F1", "taken for"]
SHOWN = 8  # labels that a message names
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Labels:
    """The label set of a classifier. `names` are in the order of their ids; a regression has one, which says nothing.

    `center` is the mean label of a regression's training rows: counts are taken from there, where they lose no digits.
    `frequency` says how many training rows have each label, in the order of `names`.
    """

    problem_type: str
    names: list[str]
    ids: dict[Any, int]
    center: float = 0.0
    frequency: list[int] = field(default_factory=list)

    def describe(self) -> str:
        """The label set in one line, the commonest first, so that one sees how uneven it is."""
        if self.problem_type == REGRESSION:
            return f"mean label {self.center:.4g}"
        order = sorted(range(len(self.names)), key=lambda place: -self.frequency[place])
        shown = _some([f"{self.names[place]} ({self.frequency[place]})" for place in order])
        rarest = f"; the rarest has {min(self.frequency)}" if len(order) > SHOWN else ""
        return f"{len(self.names)} labels by training rows: {shown}{rarest}"

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
        one side is constant. Single labels' macro F1 has a 95% interval, by bootstrap of the rows.
        """
        if self.problem_type == REGRESSION:
            _, x, y, xx, yy, xy = counts.tolist()
            of_x, of_y = xx - x * x / rows, yy - y * y / rows
            constant = of_x <= 1e-12 * xx or of_y <= 1e-12 * yy  # but for rounding
            return {"mse": correct / rows, "pearson": 0.0 if constant else (xy - x * y / rows) / math.sqrt(of_x * of_y)}
        low, high = wilson_interval(correct, rows)
        measures = {"accuracy": correct / rows, "accuracy_low": low, "accuracy_high": high}
        found, true, said = self._sides(counts)
        if self.problem_type == SINGLE:
            low, high = _macro_f1_interval(counts)
            return {
                **measures,
                "macro_f1": float(_macro_f1(found, true, said)),
                "macro_f1_low": low,
                "macro_f1_high": high,
            }
        micro = 2 * found.sum() / (true + said).sum().clamp(min=1)
        return {**measures, "micro_f1": float(micro), "macro_f1": float(_f1(found, true, said).mean())}

    def _sides(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each label the rows that have it and are said to, those that have it, those that are said to, [L] each."""
        if self.problem_type == SINGLE:
            return counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        found, missed, wrong = counts
        return found, found + missed, found + wrong

    def table(self, counts: Tensor) -> list[list[Any]]:
        """A row for each label, as `LABEL_COLUMNS` names them, from the sums of `counts`; none for a regression.

        What a single label is taken for is all of its row in the confusion matrix, the commonest first.
        """
        if self.problem_type == REGRESSION:
            return []
        found, true, said = self._sides(counts)
        measures = torch.stack([found / said.clamp(min=1), found / true.clamp(min=1), _f1(found, true, said)], dim=1)
        rows: list[list[Any]] = []
        for place, name in enumerate(self.names):
            taken = None
            if self.problem_type == SINGLE:
                errors = {other: int(n) for other, n in enumerate(counts[place].tolist()) if n and other != place}
                order = sorted(errors, key=lambda other: -errors[other])
                taken = ", ".join(f"{self.names[other]} ({errors[other]})" for other in order)
            rows.append([name, self.frequency[place], int(true[place]), *measures[place].tolist(), taken])
        return rows

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
    names, ids = _named(known)
    counted = Counter(ids[label] for row in training for label in _each(row))
    labels = Labels(problem_type, names, ids, frequency=[counted[place] for place in range(len(names))])
    for row in evaluation:
        labels.encode(row)
    return labels


def _f1(found: Tensor, true: Tensor, said: Tensor) -> Tensor:
    return 2 * found / (true + said).clamp(min=1)


def _macro_f1(found: Tensor, true: Tensor, said: Tensor) -> Tensor:
    """Mean of F1 over the last dimension, without labels that nobody has and nobody is said to have."""
    return _f1(found, true, said).sum(dim=-1) / (true + said > 0).sum(dim=-1)


def _macro_f1_interval(confusion: Tensor) -> tuple[float, float]:
    """The 95% percentile interval of macro F1 when the rows are drawn anew with replacement, as many as there are.

    Rows of one cell of the confusion matrix [L, L] are alike, so how many of each are drawn is multinomial.
    """
    cells = confusion.cpu().nonzero()  # [n, 2]
    held = confusion.cpu()[cells[:, 0], cells[:, 1]].numpy()
    draws = np.random.default_rng(0).multinomial(int(held.sum()), held / held.sum(), size=RESAMPLES)
    drawn = torch.from_numpy(draws).double()  # [RESAMPLES, n]
    true, said = (one_hot(side, len(confusion)).double() for side in cells.unbind(dim=1))  # [n, L]
    scores = _macro_f1(drawn @ (true * said), drawn @ true, drawn @ said)
    low, high = np.percentile(scores.numpy(), [2.5, 97.5])
    return float(low), float(high)


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
    shown = ", ".join(map(str, list(labels)[:SHOWN]))
    return shown + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")
