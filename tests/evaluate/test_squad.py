"""Exact match and token F1 of answers, against the numbers of SQuAD's official script."""

from __future__ import annotations

import pytest

from align.data.rows import Demonstration
from align.errors import UserError
from align.evaluate.metrics import load_metric, measure
from align.evaluate.squad import exact_match, normalize_answer, token_f1


@pytest.mark.parametrize(
    ("prediction", "gold", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1, 1),
        ("in Paris", ["Paris", "the city of Paris"], 0, 2 / 3),  # 1 of 2 words said, 1 of 1 gold
        ("city Paris", ["Paris", "the city of Paris"], 0, 4 / 5),  # "city of paris": 2 of 2 said, 2 of 3 gold
        ("Denver Denver", ["Denver"], 0, 2 / 3),  # words are counted
        ("an", ["a"], 1, 1),  # nothing is left of either, as of no answer
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("", ["the", "Paris"], 0, 0),  # a gold answer of which nothing is left does not count
        ("it's 3,000", ["its 3000"], 1, 1),
        ("theatre", ["atre"], 0, 0),  # articles are words
        ("café", ["CAFÉ"], 1, 1),
    ],
)
def test_scores_of_the_official_script(prediction, gold, exact, f1):
    assert exact_match(prediction, gold) == exact
    assert token_f1(prediction, gold) == pytest.approx(f1)


def test_normalization():
    assert normalize_answer("  The  cat,\tan (old)\nA-1 one. ") == "cat old a1 one"


def test_as_a_metric_of_generated_answers():
    metric = load_metric("squad")
    found = metric.compute(predictions=["the cat", "a big dog"], references=["Cat.", "dog"])
    assert found == {"squad_exact_match": 0.5, "squad_f1": pytest.approx((1 + 2 / 3) / 2)}

    def row(**extra):
        return Demonstration("q", "dog", "f:1", extra)

    squad = {"text": ["big dog", "wolf"], "answer_start": [0, 9]}
    for answers in (["big dog"], "big dog", squad):
        measured = measure(metric, [row(answers=answers), row()], ["a big dog", "a big dog"], ["dog", "dog"])
        assert measured.scores() == {"squad_exact_match": 0.5, "squad_f1": pytest.approx((1 + 2 / 3) / 2)}
    with pytest.raises(UserError, match="f:1: `answers`: expected a list of texts"):
        measure(metric, [row(answers=[3])], ["a"], ["b"])
