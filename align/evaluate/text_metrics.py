"""Metrics of predicted texts, as local classes of `evaluate.Metric`: those of the hub are scripts to be downloaded.

Each gives what the hub's metric of the same name gives for one reference per prediction (`bleu` what the hub's
`sacrebleu` gives). Beyond `compute`, each knows `statistics` of single rows, whose sums over any rows are all that
`score` needs: so rows can be resampled without looking at the texts again, and BLEU of a resample is its BLEU, not
a mean of sentence scores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, f1_score

from align.data.rows import Demonstration
from align.data.templates import LABEL, LABELS, TEMPLATE, label_of
from align.errors import UserError, nearest

Floats = NDArray[np.float64]
Scores = dict[str, float]


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """`compute(predictions=[...], references=[...])` of two lists of n texts.

    Attributes:
        of_rows: whether `score` says something of a single row.
        of_labels: whether the texts are taken for names of classes.
    """

    of_rows = True
    of_labels = False

    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions, references: one text each per row.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """What each row adds to the sums that make up the score, [n, d]."""
        raise NotImplementedError

    def score(self, sums: Floats) -> Scores:
        """The metric of the rows whose statistics add up to `sums` [d]."""
        raise NotImplementedError

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        return self.score(self.statistics(predictions, references).sum(axis=0))


class ExactMatch(TextMetric):
    """Share of predictions that are their reference, character by character."""

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        return np.array([[p == r, 1] for p, r in zip(predictions, references, strict=True)], dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return {"exact_match": float(sums[0] / sums[1])}


class Accuracy(TextMetric):
    """Share of predictions that name the label of their reference; case and a closing full stop do not count."""

    of_labels = True

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        pairs = zip(_labels(predictions), _labels(references), strict=True)
        return np.array([[p == r, 1] for p, r in pairs], dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return {"accuracy": float(sums[0] / sums[1])}

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        return {"accuracy": float(accuracy_score(_labels(references), _labels(predictions)))}


class F1(TextMetric):
    """F1 per label among the references, mean over these labels (`average="macro"`); labels as for accuracy.

    A prediction that is none of the labels is wrong, and makes no label of its own. In a resample, labels that occur
    in neither predictions nor references are left out of the mean.
    """

    of_rows = False
    of_labels = True

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        classes = np.array(sorted(set(_labels(references))))
        named, true = (np.array(_labels(texts))[:, None] == classes for texts in (predictions, references))
        return np.hstack([named & true, named, true]).astype(np.float64)

    def score(self, sums: Floats) -> Scores:
        hits, named, true = np.split(sums, 3)
        present = named + true > 0
        return {"f1": float((2 * hits[present] / (named + true)[present]).mean())}

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        truth = _labels(references)
        return {"f1": float(f1_score(truth, _labels(predictions), labels=sorted(set(truth)), average="macro"))}


def _labels(texts: Sequence[str]) -> list[str]:
    return [text.strip().removesuffix(".").strip().casefold() for text in texts]


class _Sacrebleu(TextMetric):
    """The statistics that sacrebleu itself resamples."""

    name_: str
    made: Any

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        rows = self.made._extract_corpus_statistics(list(predictions), [list(references)])
        return np.array(rows, dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return {self.name_: float(self.made._compute_score_from_stats(sums.astype(np.int64).tolist()).score)}

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        return {self.name_: float(self.made.corpus_score(list(predictions), [list(references)]).score)}


class Bleu(_Sacrebleu):
    """BLEU of the whole corpus by sacrebleu, 0 to 100: tokenizer 13a, exponential smoothing."""

    name_ = "bleu"
    made = BLEU(force=True)


class Chrf(_Sacrebleu):
    """chrF of the whole corpus by sacrebleu, 0 to 100: character 6-grams, no words, beta 2."""

    name_ = "chrf"
    made = CHRF()


class Rouge(TextMetric):
    """F measures of ROUGE-1, 2, L and Lsum by rouge_score, without stemming: means over the rows.

    The hub's metric gives, by default, the median of 1000 unseeded resamples of this mean instead of the mean.
    """

    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        scorer = RougeScorer(list(self.kinds), use_stemmer=False)
        rows = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
        return np.array([[*(row[kind].fmeasure for kind in self.kinds), 1] for row in rows], dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return dict(zip(self.kinds, (sums[:-1] / sums[-1]).tolist(), strict=True))


TOKEN_METRICS = ("perplexity", "token_accuracy")  # of the reference's tokens, not of what is written
METRICS: dict[str, type[TextMetric]] = {
    "exact_match": ExactMatch,
    "accuracy": Accuracy,
    "f1": F1,
    "bleu": Bleu,
    "rouge": Rouge,
    "chrf": Chrf,
}


def load_metric(name: str, known: Sequence[str] = (), key: str = "metrics") -> Any:
    """One of ours, or what `evaluate.load` finds under this name: a metric script's path, or a metric of the hub.

    Args:
        known: further names that a wrong one may be near to.
        key: of the recipe, with which an error begins.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    folder = tempfile.TemporaryDirectory()  # evaluate makes one even when all is kept in memory
    try:
        if name in METRICS:
            metric = METRICS[name](keep_in_memory=True, cache_dir=folder.name)
        else:
            metric = evaluate.load(name, keep_in_memory=True, cache_dir=folder.name)
    except Exception as error:  # the script's own imports, the network, the hub
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}: no metric {name!r}{nearest(name, [*METRICS, *known])}; ours are "
            f"{', '.join([*known, *METRICS])}, and `evaluate.load` says: {reason}"
        ) from error
    metric.folder = folder  # deleted with the metric
    return metric


def as_labels(
    rows: Sequence[Demonstration], predictions: Sequence[str], references: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What is said and what is right, as labels where templates made the rows from these, else as it is written."""
    said, right = [], []
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        labelled = LABEL in row.extra
        said.append(label_of(prediction, row.extra[TEMPLATE], row.extra[LABELS]) or "" if labelled else prediction)
        right.append(row.extra[LABEL] if labelled else reference)
    return said, right


def foreign_scores(
    name: str, metric: Any, predictions: Sequence[str], references: Sequence[str], key: str = "metrics"
) -> Scores:
    """The numbers of a metric of which nothing else is known: no intervals, no comparison.

    Raises:
        UserError: it fails on texts; begins with `key`.
    """
    try:
        found = metric.compute(predictions=predictions, references=references)
    except Exception as error:  # whatever it expects instead of texts
        raise UserError(
            f"{key}: {name} fails on texts as predictions and references: {type(error).__name__}: {error}"
        ) from error
    numbers = {name: float(value) for name, value in found.items() if isinstance(value, Real)}
    short = Path(name).stem
    return {each if each.startswith(short) else f"{short}/{each}": value for each, value in numbers.items()}
