"""Intervals and paired tests where the right answer can be counted."""

from __future__ import annotations

import numpy as np
import pytest

from align.evaluate.bootstrap import Measure, bootstrap_intervals, compare
from align.evaluate.metrics import load_metric


def mean(values) -> Measure:
    """The mean of one number per row."""
    return Measure(np.array([[value, 1.0] for value in values]), lambda sums: {"mean": sums[0] / sums[1]})


def test_the_interval_of_two_rows():
    """Both resampled alike: 0 with chance 1/4, 1/2 with 1/2, 1 with 1/4."""
    assert bootstrap_intervals(mean([0, 1]), 1000, 0)["mean"] == (0.0, 1.0)
    assert bootstrap_intervals(mean([3, 3, 3]), 1000, 0)["mean"] == (3.0, 3.0)


def test_the_interval_of_many_rows_is_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_intervals(mean(values), 4000, 0)["mean"]
    half = 1.96 * values.std() / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_a_ratio_is_of_sums():
    """Two rows, of 1 token and of 9: a mean of the rows' ratios would come to 1/2 where both are drawn, not to 1/10."""
    measure = Measure(np.array([[1.0, 1.0], [0.0, 9.0]]), lambda sums: {"share": sums[0] / sums[1]})
    assert measure.scores() == {"share": 0.1}
    assert bootstrap_intervals(measure, 1000, 0)["share"] == (0.0, 1.0)
    assert bootstrap_intervals(Measure(np.tile(measure.statistics, (50, 1)), measure.score), 1000, 0)["share"][1] < 0.2


def test_seeds():
    values = np.random.default_rng(1).normal(size=20)
    assert bootstrap_intervals(mean(values), 100, 0) == bootstrap_intervals(mean(values), 100, 0)
    assert bootstrap_intervals(mean(values), 100, 0) != bootstrap_intervals(mean(values), 100, 1)


def test_five_rows_all_better():
    """Of the 32 ways to toss five coins, two give as large a difference: p = 1/16."""
    better, worse = mean([2, 3, 4, 5, 6]), mean([1, 2, 3, 4, 5])
    found = compare(better, worse, 4000, 0)["mean"]
    assert (found.difference, found.low, found.high) == pytest.approx(
        (1.0, 1.0, 1.0)
    )  # paired: the rows' own spread does not count
    assert found.p_value == pytest.approx(1 / 16, abs=0.012)


def test_no_difference():
    found = compare(mean([1, 2, 3]), mean([1, 2, 3]), 200, 0)["mean"]
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_large_difference_is_as_rare_as_the_iterations_can_tell():
    random = np.random.default_rng(0)
    low = random.normal(size=100)
    found = compare(mean(low + 1 + random.normal(size=100)), mean(low), 500, 0)["mean"]
    assert found.p_value == 1 / 501
    assert 0.7 < found.low < found.difference < found.high < 1.4


def test_the_other_way_round():
    random = np.random.default_rng(0)
    one, other = mean(random.normal(size=30)), mean(random.normal(size=30))
    there, back = compare(one, other, 500, 3)["mean"], compare(other, one, 500, 3)["mean"]
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p_value == back.p_value


def test_p_values_are_even_where_there_is_no_difference():
    """Of 200 comparisons of two equal models, about a tenth has p <= 0.1."""
    random = np.random.default_rng(0)
    found = [
        compare(mean(random.normal(size=20)), mean(random.normal(size=20)), 99, 0)["mean"].p_value for _ in range(200)
    ]
    assert 0.05 <= np.mean(np.array(found) <= 0.1) <= 0.16


def test_bleu_changes_sides_row_by_row():
    """One row of two differs. When it changes sides the difference turns round, and stays as large: p = 1."""
    metric = load_metric("bleu")
    references = ["a b c d e f", "g h i j k l"]
    good = Measure(metric.statistics(["a b c d e f", "g h i j k l"], references), metric.score)
    worse = Measure(metric.statistics(["a b c d x f", "g h i j k l"], references), metric.score)
    found = compare(good, worse, 200, 0)["bleu"]
    assert found.difference == pytest.approx(100 - worse.scores()["bleu"])
    assert found.p_value == 1.0
    assert found.low == 0.0  # the resamples that took the other row twice
