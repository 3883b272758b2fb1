"""Losses and metrics of a classifier by the type of its problem.

All metrics come from sums over rows (`counts`, `correct`), so they are exact for any split into batches and ranks. Loss
of a row:

    single_label_classification   cross-entropy, nats
    multi_label_classification    binary cross-entropy, nats, mean over the labels
    regression                    squared error
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from align.encoders.labels import MULTI, REGRESSION, SINGLE, LabelSet
from align.evaluate.statistics import wilson_interval

LABEL_COLUMNS = ["label", "training rows", "held-out rows", "precision", "recall", "F1", "taken for"]
RESAMPLES = 1000


def losses(label_set: LabelSet, logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each row, [B] float32, from logits [B, L] and targets [B], or [B, L] for several labels."""
    if label_set.problem_type == SINGLE:
        return cross_entropy(logits, targets, reduction="none")
    if label_set.problem_type == MULTI:
        return binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    return (logits[:, 0] - targets) ** 2


def correct(label_set: LabelSet, logits: Tensor, targets: Tensor) -> Tensor:
    """Whether all labels of each row are right, [B] bool; for a regression its squared error, [B] float."""
    if label_set.problem_type == SINGLE:
        return logits.argmax(dim=1) == targets
    if label_set.problem_type == MULTI:
        return ((logits > 0) == (targets > 0)).all(dim=1)
    return losses(label_set, logits, targets)


def counts(label_set: LabelSet, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Sums over rows from which `summarize` computes the metrics, float64.

    Args:
        weight: [B], 0 for padding rows, else 1.

    Returns:
        Single label: the confusion matrix [L, L], true label by predicted label. Several labels: true positives,
        false negatives and false positives of each label, [3, L]. Regression: with x the target and y the prediction,
        less `center` so that no digits are lost, the sums of 1, x, y, x^2, y^2 and xy, [6].
    """
    weight = weight.double()[:, None]
    if label_set.problem_type == SINGLE:
        size = len(label_set.names)
        true, predicted = one_hot(targets, size).double(), one_hot(logits.argmax(dim=1), size).double()
        return (true * weight).T @ predicted
    if label_set.problem_type == MULTI:
        true, predicted = targets > 0, logits > 0
        return (torch.stack([true & predicted, true & ~predicted, ~true & predicted]) * weight).sum(dim=1)
    x, y = targets.double() - label_set.center, logits[:, 0].double() - label_set.center
    return (torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]) * weight[:, 0]).sum(dim=1)


def summarize(label_set: LabelSet, counts: Tensor, num_correct: float, rows: int) -> dict[str, float]:
    """Metrics by name from the sums of `counts` and `correct` over `rows` rows.

    Macro F1 is the mean over labels of 2 TP / (2 TP + FN + FP), as in scikit-learn: a single label that is neither true
    nor predicted anywhere is left out, one of several counts as 0; precision of a label that is never predicted is 0. The correlation is 0 where one side is constant.
    Accuracy has a Wilson interval, macro F1 of single labels a bootstrap interval, 95% each.
    """
    if label_set.problem_type == REGRESSION:
        _, x, y, xx, yy, xy = counts.tolist()
        ss_x, ss_y = xx - x * x / rows, yy - y * y / rows
        constant = ss_x <= 1e-12 * xx or ss_y <= 1e-12 * yy  # up to rounding
        pearson = 0.0 if constant else (xy - x * y / rows) / math.sqrt(ss_x * ss_y)
        return {"mse": num_correct / rows, "pearson": pearson}
    low, high = wilson_interval(num_correct, rows)
    metrics = {"accuracy": num_correct / rows, "accuracy_low": low, "accuracy_high": high}
    hits, true, predicted = _totals(label_set, counts)
    if label_set.problem_type == SINGLE:
        low, high = _macro_f1_interval(counts)
        macro_f1 = float(_macro_f1(hits, true, predicted))
        metrics |= {"macro_f1": macro_f1, "macro_f1_low": low, "macro_f1_high": high}
        there = true + predicted > 0
        for name, of in (("macro_precision", predicted), ("macro_recall", true)):
            metrics[name] = float((hits / of.clamp(min=1))[there].mean())
        return metrics
    micro_f1 = float(2 * hits.sum() / (true + predicted).sum().clamp(min=1))
    return {**metrics, "micro_f1": micro_f1, "macro_f1": float(_f1(hits, true, predicted).mean())}


def per_label_table(label_set: LabelSet, counts: Tensor) -> list[list[Any]]:
    """A row for each label with the `LABEL_COLUMNS`, by decreasing frequency in training; none for a regression.

    "taken for" lists the wrong predictions for rows of a single label, the most frequent first.
    """
    if label_set.problem_type == REGRESSION:
        return []
    hits, true, predicted = _totals(label_set, counts)
    precision, recall = hits / predicted.clamp(min=1), hits / true.clamp(min=1)
    values = torch.stack([precision, recall, _f1(hits, true, predicted)], dim=1)
    rows: list[list[Any]] = []
    for index, name in enumerate(label_set.names):
        taken_for = None
        if label_set.problem_type == SINGLE:
            errors = {other: int(n) for other, n in enumerate(counts[index].tolist()) if n and other != index}
            order = sorted(errors, key=lambda other: -errors[other])
            taken_for = ", ".join(f"{label_set.names[other]} ({errors[other]})" for other in order)
        rows.append([name, label_set.frequency[index], int(true[index]), *values[index].tolist(), taken_for])
    return sorted(rows, key=lambda row: -row[1])


def constant_baseline(label_set: LabelSet, training: Sequence[Any], evaluation: Sequence[Any]) -> dict[str, float]:
    """Metrics on the evaluation targets of always predicting the most frequent training target, or their mean."""
    targets = torch.tensor(evaluation)
    if label_set.problem_type == REGRESSION:
        prediction = torch.tensor([label_set.center])
    elif label_set.problem_type == MULTI:
        prediction = torch.tensor(Counter(map(tuple, training)).most_common(1)[0][0]) - 0.5
    else:
        prediction = one_hot(torch.tensor(Counter(training).most_common(1)[0][0]), len(label_set.names)).float()
    logits = prediction.expand(len(targets), -1)
    sums = counts(label_set, logits, targets, torch.ones(len(targets)))
    return summarize(label_set, sums, float(correct(label_set, logits, targets).double().sum()), len(targets))


def _totals(label_set: LabelSet, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each label that are true and predicted, true, and predicted: [L] each."""
    if label_set.problem_type == SINGLE:
        return counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    hits, misses, false_positives = counts
    return hits, hits + misses, hits + false_positives


def _f1(hits: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
    return 2 * hits / (true + predicted).clamp(min=1)


def _macro_f1(hits: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
    """Mean of F1 over the last dimension, without labels that are neither true nor predicted."""
    return _f1(hits, true, predicted).sum(dim=-1) / (true + predicted > 0).sum(dim=-1)


def _macro_f1_interval(confusion: Tensor) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of macro F1, from the confusion matrix [L, L].

    Rows of one cell are alike, so the number of them in a resample is multinomial.
    """
    cells = confusion.cpu().nonzero()  # [n, 2]
    sizes = confusion.cpu()[cells[:, 0], cells[:, 1]].numpy()
    draws = np.random.default_rng(0).multinomial(int(sizes.sum()), sizes / sizes.sum(), size=RESAMPLES)
    resamples = torch.from_numpy(draws).double()  # [RESAMPLES, n]
    true, predicted = (one_hot(side, len(confusion)).double() for side in cells.unbind(dim=1))  # [n, L]
    scores = _macro_f1(resamples @ (true * predicted), resamples @ true, resamples @ predicted)
    low, high = np.percentile(scores.numpy(), [2.5, 97.5])
    return float(low), float(high)
