"""Metrics of generated text as local classes of `evaluate.Metric`: the hub's are scripts that have to be downloaded.

With one reference per prediction each gives what the hub's metric of the same name gives (`bleu`: the hub's
`sacrebleu`). Besides `compute` each has `statistics` of single rows and a `score` of their sums, so that rows can be
resampled without the texts, and BLEU of a resample is corpus BLEU, not a mean of sentence scores.

A library is imported by the metric that needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from align.compat.others import bleu_score, bleu_statistics
from align.evaluate.bootstrap import Floats
from align.evaluate.squad import exact_match, token_f1

Scores = dict[str, float]


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """`compute(predictions=[...], references=[...])` of two lists of n texts.

    Attributes:
        has_row_scores: whether `score` of a single row means something.
        compares_labels: whether the texts are compared as names of classes.
    """

    has_row_scores = True
    compares_labels = False

    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions, references: one text each per row.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """Each row's terms of the sums that determine the score, [n, d]."""
        raise NotImplementedError

    def score(self, sums: Floats) -> Scores:
        """The metric of the rows whose statistics add up to `sums` [d]."""
        raise NotImplementedError

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        return self.score(self.statistics(predictions, references).sum(axis=0))


class ExactMatch(TextMetric):
    """Share of predictions that equal their reference, character by character."""

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        return np.array([[p == r, 1] for p, r in zip(predictions, references, strict=True)], dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return {"exact_match": float(sums[0] / sums[1])}


class Accuracy(TextMetric):
    """Share of predictions that name the label of their reference, ignoring case and a final full stop."""

    compares_labels = True

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        pairs = zip(_labels(predictions), _labels(references), strict=True)
        return np.array([[p == r, 1] for p, r in pairs], dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return {"accuracy": float(sums[0] / sums[1])}

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(_labels(references), _labels(predictions)))}


class F1(TextMetric):
    """Macro F1: the unweighted mean of the F1 of each label among the references. Labels as for accuracy.

    A prediction that is none of the labels is wrong, and adds no label. In a resample, labels that occur in neither
    predictions nor references are left out of the mean.
    """

    has_row_scores = False
    compares_labels = True

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        classes = np.array(sorted(set(_labels(references))))
        predicted, true = (np.array(_labels(texts))[:, None] == classes for texts in (predictions, references))
        return np.hstack([predicted & true, predicted, true]).astype(np.float64)

    def score(self, sums: Floats) -> Scores:
        correct, predicted, true = np.split(sums, 3)
        present = predicted + true > 0
        return {"f1": float((2 * correct[present] / (predicted + true)[present]).mean())}

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        from sklearn.metrics import f1_score

        true = _labels(references)
        return {"f1": float(f1_score(true, _labels(predictions), labels=sorted(set(true)), average="macro"))}


class Squad(TextMetric):
    """Exact match and token F1 of answers as SQuAD defines them, 0 to 1. Of several references of a row the best counts."""

    def statistics(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> Floats:
        gold = [[each] if isinstance(each, str) else each for each in references]
        rows = [[exact_match(p, g), token_f1(p, g), 1] for p, g in zip(predictions, gold, strict=True)]
        return np.array(rows, dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return {"squad_exact_match": float(sums[0] / sums[2]), "squad_f1": float(sums[1] / sums[2])}


def _labels(texts: Sequence[str]) -> list[str]:
    return [text.strip().removesuffix(".").strip().casefold() for text in texts]


class SacrebleuMetric(TextMetric):
    """A corpus metric of sacrebleu, from the statistics that sacrebleu itself resamples."""

    key: str  # of the result

    @functools.cached_property
    def scorer(self) -> Any:
        """sacrebleu's object, which computes the metric."""
        raise NotImplementedError

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        rows = bleu_statistics(self.scorer, list(predictions), list(references))
        return np.array(rows, dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return {self.key: bleu_score(self.scorer, sums.astype(np.int64).tolist())}

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        return {self.key: float(self.scorer.corpus_score(list(predictions), [list(references)]).score)}


class Bleu(SacrebleuMetric):
    """Corpus BLEU by sacrebleu, 0 to 100: tokenizer 13a, exponential smoothing."""

    key = "bleu"

    @functools.cached_property
    def scorer(self) -> Any:
        from sacrebleu.metrics import BLEU

        return BLEU(force=True)


class Chrf(SacrebleuMetric):
    """Corpus chrF by sacrebleu, 0 to 100: character 6-grams, no word n-grams, beta 2."""

    key = "chrf"

    @functools.cached_property
    def scorer(self) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF()


class Rouge(TextMetric):
    """F measures of ROUGE-1, 2, L and Lsum by rouge_score, without stemming: means over the rows.

    By default the hub's metric gives instead the median of 1000 unseeded bootstrap resamples of this mean.
    """

    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(self.kinds), use_stemmer=False)
        rows = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
        return np.array([[*(row[kind].fmeasure for kind in self.kinds), 1] for row in rows], dtype=np.float64)

    def score(self, sums: Floats) -> Scores:
        return dict(zip(self.kinds, (sums[:-1] / sums[-1]).tolist(), strict=True))


METRICS: dict[str, type[TextMetric]] = {
    "exact_match": ExactMatch,
    "accuracy": Accuracy,
    "f1": F1,
    "squad": Squad,
    "bleu": Bleu,
    "rouge": Rouge,
    "chrf": Chrf,
}
