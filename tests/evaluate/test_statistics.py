"""Intervals, accuracies and win rates by hand; degeneration measures; tables."""

from __future__ import annotations

import pytest

from align.evaluate.statistics import preference_accuracy, repetition, wilson_interval, win_rate
from align.runs.tables import markdown_table
from tests import ranks


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # z^2 = 3.8416. 8 of 10: (0.8 + 0.19208 -+ 1.96 sqrt(0.016 + 0.009604)) / 1.38416 = (0.99208 -+ 0.313625) / 1.38416
        (8, 10, 0.490157, 0.943319),
        (7.5, 10, 0.442176, 0.919054),  # one tie
        (5, 10, 0.236590, 0.763410),  # symmetric about 1/2
        (0, 10, 0.0, 0.277540),  # z^2 / (n + z^2) = 3.8416 / 13.8416
        (10, 10, 0.722460, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_narrows_with_z_and_n() -> None:
    assert wilson_interval(5, 10, z=1.0) == pytest.approx((0.349244, 0.650756), abs=1e-6)  # 0.5 -+ 0.5 / sqrt(11)
    low, high = wilson_interval(5000, 10000)
    assert high - low == pytest.approx(2 * 0.0098, abs=1e-4)


def test_wilson_interval_stays_within_0_and_1() -> None:
    for n in range(1, 200):  # rounding would carry some of these beyond
        assert wilson_interval(0, n)[0] >= 0.0
        assert wilson_interval(n, n)[1] <= 1.0


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10)])
def test_wilson_interval_refuses_impossible_counts(successes: float, n: int) -> None:
    with pytest.raises(ValueError, match="0 to n = 10"):
        wilson_interval(successes, n)


def test_preference_accuracy_counts_ties_half() -> None:
    result = preference_accuracy([2.0, 1.0, 0.5, 3.0], [1.0, 1.0, 0.7, -3.0])  # won, tied, lost, won
    low, high = wilson_interval(2.5, 4)
    assert result == {"accuracy": 0.625, "low": low, "high": high, "n": 4}


def test_preference_accuracy_keeps_close_scores_apart() -> None:
    # Equal in float32, so a metric that stores float32 would call it a tie.
    assert preference_accuracy([1.0 + 1e-9], [1.0])["accuracy"] == 1.0


def test_preference_accuracy_twice_is_independent() -> None:
    assert preference_accuracy([1.0], [0.0])["n"] == 1
    assert preference_accuracy([1.0, 0.0], [0.0, 1.0])["accuracy"] == 0.5


def test_win_rate_is_of_the_first_argument() -> None:
    result = win_rate([1.0, 2.0, 3.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0, 1.0])  # three wins, one tie, one loss
    low, high = wilson_interval(3.5, 5)
    assert result == {"win_rate": 0.7, "low": low, "high": high, "n": 5}


@pytest.mark.parametrize("judge", [preference_accuracy, win_rate])
def test_scores_that_cannot_be_compared_are_refused(judge: object) -> None:
    assert callable(judge)
    with pytest.raises(ValueError, match="got 2 and 1"):
        judge([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        judge([], [])
    with pytest.raises(ValueError, match="got NaN"):
        judge([1.0, float("nan")], [0.0, 0.0])
    with pytest.raises(ValueError, match="got NaN"):
        judge([1.0, 0.0], [0.0, float("nan")])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("two words", 0.0),
        ("a b c d e", 0.0),
        ("a a a a a", 2 / 3),  # three 3-grams, of which two repeat the first
        ("the cat sat on the cat sat", 1 / 5),  # "the cat sat" comes again
        ("the  cat\nsat the cat sat", 1 / 4),  # whitespace does not matter
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_markdown_table() -> None:
    table = markdown_table(["measure", "before", "after"], [["score", None, 1.23456], ["n", 3, 12345]])
    assert table == "| measure | before | after |\n| --- | --- | --- |\n| score |  | 1.235 |\n| n | 3 | 12345 |\n"


def test_markdown_table_survives_what_models_write() -> None:
    assert markdown_table(["text"], [["a|b\n<s>\\|"]]).splitlines()[2] == r"| a\|b<br>&lt;s>\\\| |"


def test_metric_libraries_are_imported_only_when_a_metric_is_loaded(tmp_path) -> None:
    """In the server of forks: the statistics alone, then every stage, then a metric, then one with a library of its own."""
    done = ranks.run(ranks.execute, "import libraries; print(libraries.imported)", ranks=1, log=tmp_path / "fork")
    assert done.stdout.splitlines()[-1] == "[[], [], ['evaluate'], ['evaluate', 'sacrebleu']]"
