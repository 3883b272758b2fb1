"""Intervals and paired tests where the right answer can be counted, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

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


# --- against scipy, which cannot replace ours: it refuses a single row (a task may have one), has no NaN among the
# resamples (a grader may pass on rows), and takes one score at a time (ROUGE has four).


def scipy_scores() -> dict[str, tuple]:
    """A mean and a ratio of sums as ours, from statistics [n, d], and as scipy wants it, of rows along an axis."""
    return {
        "mean": (lambda sums: {"score": sums[0] / sums[1]}, lambda x, n, axis: x.mean(axis)),
        "perplexity": (
            lambda sums: {"score": math.exp(sums[0] / sums[1])},
            lambda x, n, axis: np.exp(x.sum(axis) / n.sum(axis)),
        ),
    }


def paired_data(name: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of two models on the same rows, and the rows' sizes (1 for a mean)."""
    random = np.random.default_rng(seed)
    sizes = np.ones(count) if name == "mean" else random.integers(1, 30, count).astype(np.float64)
    ours = sizes * random.exponential(1.0, count)
    return ours, ours * random.uniform(0.6, 1.3, count), sizes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mean", "perplexity"])
def test_intervals_are_those_of_scipy(name, seed):
    """The same generator draws the same resamples, so that the percentiles agree to rounding."""
    score, scipy_score = scipy_scores()[name]
    ours, _, sizes = paired_data(name, seed, 40)
    expected = stats.bootstrap(
        (ours, sizes), scipy_score, n_resamples=400, method="percentile", paired=True, vectorized=True,
        rng=np.random.default_rng([seed, 0]),
    )  # fmt: skip
    found = bootstrap_intervals(Measure(np.stack([ours, sizes], axis=1), score), 400, seed)["score"]
    assert found == pytest.approx(tuple(expected.confidence_interval), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mean", "perplexity"])
def test_intervals_of_differences_are_those_of_scipy(name, seed):
    score, scipy_score = scipy_scores()[name]
    ours, theirs, sizes = paired_data(name, seed, 40)
    expected = stats.bootstrap(
        (ours, theirs, sizes), lambda a, b, n, axis: scipy_score(a, n, axis) - scipy_score(b, n, axis),
        n_resamples=400, method="percentile", paired=True, vectorized=True, rng=np.random.default_rng([seed, 0]),
    )  # fmt: skip
    pair = [Measure(np.stack([values, sizes], axis=1), score) for values in (ours, theirs)]
    found = compare(*pair, 400, seed)["score"]
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mean", "perplexity"])
def test_p_values_are_those_of_scipy(name, seed):
    """scipy counts all 2^10 swaps of ten rows; ours are N random ones.

    With p the exact value, the count of swaps that are at least as extreme is binomial, so (1 + count) / (1 + N) has a
    standard deviation of sqrt(p (1 - p) / N) and lies within five of them (and the 1 / N that the observed assignment
    adds) but for one seed in two million.
    """
    score, scipy_score = scipy_scores()[name]
    ours, theirs, sizes = paired_data(name, seed, 10)
    exact = stats.permutation_test(
        (ours, theirs), lambda a, b, axis: scipy_score(a, sizes, axis) - scipy_score(b, sizes, axis),
        permutation_type="samples", vectorized=True, n_resamples=2**10,
    )  # fmt: skip
    assert len(exact.null_distribution) == 2**10
    iterations = 10_000
    pair = [Measure(np.stack([values, sizes], axis=1), score) for values in (ours, theirs)]
    found = compare(*pair, iterations, seed)["score"]
    assert found.difference == pytest.approx(exact.statistic, rel=1e-12)
    error = 5 * math.sqrt(exact.pvalue * (1 - exact.pvalue) / iterations) + 1 / iterations
    assert found.p_value == pytest.approx(exact.pvalue, abs=error)
