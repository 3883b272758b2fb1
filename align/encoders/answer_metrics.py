"""Exact match and F1 of the answers to questions, by the windows of their passages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.data.rows import Question
from align.encoders.windows import Window
from align.evaluate.bootstrap import Floats, Measure, bootstrap_intervals
from align.evaluate.squad import exact_match, token_f1

ANSWER_COLUMNS = ["questions", "held out", "exact match", "F1"]
RESAMPLES = 1000
MOST = 1000  # training answers that the baseline looks for in any passage


def answers_of(
    windows: Sequence[Window], found: Floats, questions: Sequence[Question], unanswerable: bool
) -> list[str]:
    """The answer to each question: the best of all its windows, or "" if the score of no answer is higher in each of them.

    Args:
        found: score, first character and the one after the last of the best answer of each window, and the score of no
            answer, [windows, 4].
        unanswerable: whether "" may be the answer.
    """
    best: dict[int, tuple[float, int, int]] = {}
    null: dict[int, float] = {}
    for window, (score, start, end, without) in zip(windows, found.tolist(), strict=True):
        if end and (window.question not in best or score > best[window.question][0]):
            best[window.question] = score, int(start), int(end)
        null[window.question] = min(without, null.get(window.question, np.inf))
    answers = []
    for number, question in enumerate(questions):
        score, start, end = best.get(number, (-np.inf, 0, 0))
        answers.append("" if unanswerable and null[number] > score else question.context[start:end])
    return answers


def answer_scores(answers: Sequence[str], questions: Sequence[Question]) -> Floats:
    """Exact match, F1 and 1 of each question, [questions, 3]."""
    gold = [[text for _, text in question.answers] for question in questions]
    return np.array([[exact_match(a, g), token_f1(a, g), 1] for a, g in zip(answers, gold, strict=True)])


def answer_metrics(scores: Floats) -> dict[str, float]:
    """Metrics by name, shares from 0 to 1 with 95% bootstrap intervals over the questions, from `answer_scores`."""
    metrics: dict[str, float] = {}
    intervals = bootstrap_intervals(Measure(scores, _means), RESAMPLES, 0)
    for name, value in _means(scores.sum(axis=0)).items():
        low, high = intervals[name]
        metrics |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return metrics


def _means(sums: Floats) -> dict[str, float]:
    return {"exact_match": float(sums[0] / sums[2]), "f1": float(sums[1] / sums[2])}


def answer_table(scores: Floats, questions: Sequence[Question]) -> list[list[Any]]:
    """A row with the `ANSWER_COLUMNS` for questions with an answer and for those without; none if all are of one kind."""
    has = np.array([bool(question.answers) for question in questions])
    kinds = [("with an answer", scores[has]), ("without an answer", scores[~has])]
    if has.all() or not has.any():
        return []
    return [[name, len(each), *_means(each.sum(axis=0)).values()] for name, each in kinds]


def floor_scores(training: Sequence[Question], evaluation: Sequence[Question]) -> Floats:
    """Scores of the baseline: `commonest_answers`, or no answer to any question where that is right more often."""
    answers = (commonest_answers(training, evaluation), [""] * len(evaluation))
    return max(
        (answer_scores(each, evaluation) for each in answers), key=lambda scores: answer_metrics(scores)["exact_match"]
    )


def commonest_answers(training: Sequence[Question], evaluation: Sequence[Question]) -> list[str]:
    """The answers of the baseline: the commonest training answer that the passage holds, of the same question if there is one.

    "" where there is none.
    """
    of_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
    of_all: Counter[str] = Counter()
    for row in training:
        for text in dict.fromkeys(text for _, text in row.answers):
            of_question[row.question][text] += 1
            of_all[text] += 1
    common = [text for text, _ in of_all.most_common(MOST)]
    answers = []
    for row in evaluation:
        same = [text for text, _ in of_question[row.question].most_common()] if row.question in of_question else []
        answers.append(next((text for text in (*same, *common) if text in row.context), ""))
    return answers
