"""Load metrics by name, and apply them to predictions and references.

Importing this loads none of the libraries that compute metrics (evaluate, scikit-learn, nltk, sacrebleu, rouge_score):
together they take longer to import than a small evaluation takes to run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from align.data.hub import go_offline_if_unreachable
from align.data.rows import Demonstration
from align.data.templates import LABEL, LABELS, TEMPLATE, parse_label
from align.errors import UserError, nearest
from align.evaluate.bootstrap import Measure

TOKEN_METRICS = (
    "perplexity",
    "token_accuracy",
    "bits_per_byte",
)  # of the reference's tokens; nothing is generated for them


def load_metric(name: str, known: Sequence[str] = (), key: str = "metrics") -> Any:
    """One of `METRICS`, or else what `evaluate.load` finds: a metric script's path, or a metric of the hub.

    Args:
        known: further names to suggest for a misspelt one.
        key: recipe key, for the error.

    Raises:
        UserError: there is no such metric, or it cannot be loaded.
    """
    import evaluate

    from align.evaluate.text_metrics import METRICS

    folder = tempfile.TemporaryDirectory()  # evaluate creates a folder even with `keep_in_memory`
    try:
        if name in METRICS:
            metric: Any = METRICS[name](keep_in_memory=True, cache_dir=folder.name)
        else:
            if not os.path.exists(name):
                go_offline_if_unreachable()
            metric = evaluate.load(name, keep_in_memory=True, cache_dir=folder.name)
    except (Exception, SystemExit) as error:  # the script's own imports, the network, the hub
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}: no metric {name!r}{nearest(name, [*METRICS, *known])}; built in are "
            f"{', '.join([*known, *METRICS])}, and `evaluate.load` failed with: {reason}"
        ) from error
    metric.folder = folder  # deleted with the metric
    return metric


def measure(
    metric: Any, rows: Sequence[Demonstration], predictions: Sequence[str], references: Sequence[str]
) -> Measure | None:
    """Statistics per row and the score that their sums give; None for a metric that is not one of `METRICS`."""
    from align.evaluate.text_metrics import Squad, TextMetric

    if not isinstance(metric, TextMetric):
        return None
    if metric.compares_labels:
        predictions, references = as_labels(rows, predictions, references)
    if isinstance(metric, Squad):
        several = [[reference, *_answers(row)] for row, reference in zip(rows, references, strict=True)]
        return Measure(metric.statistics(predictions, several), metric.score, metric.has_row_scores)
    return Measure(metric.statistics(predictions, references), metric.score, metric.has_row_scores)


def _answers(row: Demonstration) -> list[str]:
    """Further right answers in the row's column `answers`: texts, or SQuAD's {text: [...], answer_start: [...]}.

    Raises:
        UserError: the column holds something else.
    """
    answers = row.extra.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    found = [texts] if isinstance(texts, str) else [] if texts is None else texts
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{row.where}: `answers`: expected a list of texts, as further references of the metric squad.")
    return found


def as_labels(
    rows: Sequence[Demonstration], predictions: Sequence[str], references: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Predicted and true labels of rows that templates made from labeled ones; other rows keep their texts.

    A prediction that names no label of its template becomes "".
    """
    predicted, true = [], []
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        labelled = LABEL in row.extra
        predicted.append(
            parse_label(prediction, row.extra[TEMPLATE], row.extra[LABELS]) or "" if labelled else prediction
        )
        true.append(row.extra[LABEL] if labelled else reference)
    return predicted, true


def external_scores(
    name: str, metric: Any, predictions: Sequence[str], references: Sequence[str], key: str = "metrics"
) -> dict[str, float]:
    """The scores of a metric that is not one of `METRICS`; without statistics per row it has no intervals.

    Raises:
        UserError: the metric does not accept texts; begins with `key`.
    """
    try:
        found = metric.compute(predictions=predictions, references=references)
    except (Exception, SystemExit) as error:  # whatever it expects instead of texts
        raise UserError(
            f"{key}: {name} fails on texts as predictions and references: {type(error).__name__}: {error}"
        ) from error
    numbers = {name: float(value) for name, value in found.items() if isinstance(value, Real)}
    short = Path(name).stem
    return {each if each.startswith(short) else f"{short}/{each}": value for each, value in numbers.items()}
