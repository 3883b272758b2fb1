"""Scores against people's ratings, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.data.rows import Demonstration
from align.errors import UserError
from align.judge.ratings import CORRELATIONS, correlation, rated_pairs, rating_agreement, ratings_of
from align.judge.verdicts import judge

SCORES, RATINGS = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])


def test_correlations_by_hand():
    """Squared rank differences 0, 1, 1, 0: Spearman 1 - 6 x 2 / (4 x 15). Of six pairs one is turned round: Kendall 4/6."""
    found = [correlation(name, SCORES, RATINGS) for name in ("pearson", "spearman", "kendall")]
    assert found == pytest.approx([0.8, 0.8, 4 / 6])
    weights = np.array([2.0, 0.0, 1.0, 1.0])
    drawn = [0, 0, 2, 3]
    for name in CORRELATIONS:
        assert correlation(name, SCORES**2, RATINGS, weights) == correlation(name, SCORES[drawn] ** 2, RATINGS[drawn])
        assert math.isnan(correlation(name, SCORES, RATINGS, np.array([3.0, 0.0, 0.0, 0.0])))
        assert math.isnan(correlation(name, SCORES, np.ones(4)))
    assert correlation("pearson", SCORES**2, RATINGS) != pytest.approx(correlation("spearman", SCORES**2, RATINGS))


def test_pairs_are_of_one_prompt_and_rated_differently():
    right, places = rated_pairs(SCORES, RATINGS, np.array([0, 1, 1, 0]))
    assert (right.tolist(), places.tolist()) == ([1.0, 0.0], [0, 1])
    right, places = rated_pairs(np.array([5.0, 5.0, 1.0]), np.array([2.0, 1.0, 1.0]), np.zeros(3, dtype=np.int64))
    assert right.tolist() == [0.5, 1.0], "equal scores are half right, equal ratings no pair"
    assert rated_pairs(SCORES, RATINGS, np.arange(4))[0].tolist() == []


def test_against_a_second_reward():
    """The same order has no difference, the opposite one twice the correlation; a shift by prompt changes no pair."""
    random = np.random.default_rng(0)
    prompts, ratings = np.repeat(np.arange(12), 5), random.integers(1, 6, 60).astype(np.float64)
    scores = ratings + random.normal(size=60)
    same = rating_agreement(scores, 3 * scores + 1, ratings, prompts, 50, 0)
    opposite = rating_agreement(scores, -scores, ratings, prompts, 50, 0)
    for name in CORRELATIONS:
        assert same["second"][name] == pytest.approx(same[name])
        assert [same["difference"][name][key] for key in ("value", "low", "high")] == pytest.approx([0] * 3, abs=1e-12)
        assert opposite["difference"][name]["value"] == pytest.approx(2 * same[name]["value"])
        assert same[name]["low"] < same[name]["value"] < same[name]["high"]
        assert (same[name]["n"], same[name]["prompts"]) == (60, 12)
    pairs = same["pair_accuracy"]
    assert pairs["n"] == sum(len(set(pair)) == 2 for each in np.split(ratings, 12)
                             for pair in zip(*each[np.array(np.triu_indices(5, 1))], strict=True))  # fmt: skip
    assert opposite["second"]["pair_accuracy"]["value"] == pytest.approx(1 - pairs["value"])
    assert opposite["difference"]["pair_accuracy"]["value"] == pytest.approx(2 * pairs["value"] - 1)
    shifted = rating_agreement(scores + 100 * prompts, None, ratings, prompts, 50, 0)
    assert shifted["pair_accuracy"] == pairs
    assert abs(shifted["spearman"]["value"]) < abs(same["spearman"]["value"])
    assert "second" not in shifted


@pytest.mark.parametrize("value", [None, "4", True, float("nan"), [4, 5]])
def test_ratings_that_are_none(value):
    rows = [Demonstration("p", "c", f"f.jsonl row {i + 1}", {"rating": each}) for i, each in enumerate([3, value])]
    with pytest.raises(UserError, match=r"samples_dataset: f\.jsonl row 2: expected a number as `rating`, got"):
        ratings_of(rows)
    assert ratings_of([Demonstration("p", "c", "", {"rating": each}) for each in (3, 4.5)]).tolist() == [3, 4.5]
    assert ratings_of([Demonstration("p", "c", "")]) is None


def test_verdicts():
    """Related; not related; related over all responses by what the prompts are rated, and not within them; constant."""
    random = np.random.default_rng(0)
    prompts, noise = np.repeat(np.arange(20), 6), random.normal(size=(2, 120))
    ratings = np.round(3 + prompts / 5 + noise[0])
    for scores, verdict in (
        (ratings + noise[1], "good"), (noise[1], "bad"), (-ratings, "bad"), (prompts + noise[1], "doubtful"), (np.ones(120), "doubtful"),
    ):  # fmt: skip
        (line,) = judge({"ratings": rating_agreement(scores, None, ratings, prompts, 40, 0)})
        assert (line["line"], line["verdict"]) == ("ratings", verdict)
