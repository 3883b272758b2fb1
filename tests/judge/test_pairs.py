"""Pair metrics and length bias against hand arithmetic, planted truths and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from align.data.rows import Preference
from align.judge.length import length_controlled, length_metrics, spearman
from align.judge.pairs import (
    Outcomes,
    brier,
    calibration_statistics,
    ece,
    ece_after_temperature,
    ece_if_calibrated,
    mean_with_interval,
    nll,
    number_prompts,
    pair_metrics,
    reliability,
    temperature,
)
from align.judge.rows import ScoredPairs
from align.judge.slices import length_thirds, slices
from align.judge.verdicts import judge

MARGINS = np.array([2.0, 1.0, 0.5, -0.5, -1.0, 3.0])


def outcomes(margins, prompts=None, ties=None) -> Outcomes:
    margins = np.array(margins, dtype=np.float64)
    return Outcomes(
        margins,
        np.arange(len(margins)) if prompts is None else np.array(prompts),
        np.zeros(len(margins), dtype=bool) if ties is None else np.array(ties),
    )


def ece_of(margins, bins=10) -> float:
    each = outcomes(margins)
    return ece(calibration_statistics(each.margins, each.right, bins).sum(axis=0))


def test_six_margins_by_hand():
    assert nll(MARGINS).mean() == pytest.approx(0.541699, abs=1e-6)
    assert brier(MARGINS).mean() == pytest.approx(0.192205, abs=1e-6)
    assert ece_of(MARGINS, bins=5) == pytest.approx(0.145611, abs=1e-6)
    assert nll(np.array([1.0 - 0.5]))[0] == pytest.approx(0.474077, abs=1e-6)  # delta 1, margin .5
    bins = reliability(outcomes(MARGINS), bins=5)
    assert [each["n"] for each in bins] == [2, 2, 1, 1]
    assert [each["accuracy"] for each in bins] == [0.5, 0.5, 1, 1]


def test_a_tie_is_half_won_and_half_lost():
    assert nll(np.array([0.0]), 0.5)[0] == pytest.approx(np.log(2))
    near = nll(np.array([-0.1, 0.0, 0.1]), 0.5)
    assert near[1] < near[0] == near[2]
    assert nll(np.array([2.0]), 0.5)[0] == pytest.approx((nll(np.array([2.0]))[0] + nll(np.array([-2.0]))[0]) / 2)
    assert brier(np.array([2.0]), 0.5)[0] == pytest.approx(expit(2.0) ** 2 / 2 + expit(-2.0) ** 2 / 2)
    found = pair_metrics(outcomes([2, 1, -1, 0, 5], ties=[False, False, False, False, True]), 20, 0)
    assert found["accuracy"]["value"] == pytest.approx((1 + 1 + 0 + 0.5) / 4), (
        "equal scores count 1/2, ties in the data not"
    )
    assert found["accuracy"]["n"] == 4
    assert (found["ties_in_data"], found["ties_in_scores"]) == (1, 1)
    expected = (nll(np.array([2.0, 1, -1, 0])).sum() + nll(np.array([5.0]), 0.5).sum()) / 5
    assert found["nll"]["value"] == pytest.approx(expected)


def test_calibration_of_labels_drawn_from_their_own_probabilities():
    random = np.random.default_rng(0)
    margins = random.normal(0, 1.5, 20_000)
    margins *= np.where(random.random(20_000) < expit(margins), 1, -1)
    assert ece_of(margins) < 0.015
    assert ece_of(margins) < ece_if_calibrated(margins, 0)
    assert ece_of(3 * margins) > 0.1
    assert ece_of(3 * margins) > ece_if_calibrated(3 * margins, 0)
    assert temperature(3 * margins[:10_000]) == pytest.approx(3, rel=0.05)
    assert ece_of(3 * margins[10_000:] / temperature(3 * margins[:10_000])) < 0.015
    assert ece_after_temperature(outcomes(3 * margins), 0) < 0.015


def test_intervals_are_over_prompts():
    """Twenty copies of each of thirty pairs tell no more than thirty pairs."""
    right = np.random.default_rng(1).integers(0, 2, 30).astype(np.float64)
    alone = mean_with_interval(right, np.arange(30), 500, 0)
    copied = mean_with_interval(np.repeat(right, 20), np.repeat(np.arange(30), 20), 500, 0)
    as_pairs = mean_with_interval(np.repeat(right, 20), np.arange(600), 500, 0)
    assert (copied["low"], copied["high"]) == (alone["low"], alone["high"])
    assert (copied["n"], copied["prompts"]) == (600, 30)
    assert as_pairs["high"] - as_pairs["low"] < 0.4 * (copied["high"] - copied["low"])
    one = mean_with_interval(right, np.zeros(30, dtype=np.int64), 500, 0)
    assert (one["low"], one["high"]) == (None, None), "one prompt has no interval"
    assert number_prompts(["b", "a", "b"]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_length_controlled_win_rate(seed):
    random = np.random.default_rng(seed)
    differences = random.normal(0, 50, 20_000)
    wins = random.random(20_000) < expit(0.4 + np.tanh(differences / differences.std()))
    assert 0.591 < length_controlled(wins.astype(np.float64), differences) < 0.604  # sigmoid(.4) is .5987


def test_length_controlled_without_variation():
    assert length_controlled(np.array([1.0, 0.5, 0.0, 1.0]), np.zeros(4)) == 0.625
    assert length_controlled(np.ones(3), np.array([1.0, 2, -1])) == 1.0


def test_a_reward_that_is_the_length():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 200, 60).astype(np.float64), random.integers(1, 200, 60).astype(np.float64)
    found = length_metrics(outcomes(lengths[0] - lengths[1]), lengths, lengths, 50, 0)
    assert found["score_with_length"]["value"] == pytest.approx(1)
    assert found["within_pairs"]["value"] == pytest.approx(1)
    assert found["accuracy_longer_won"]["value"] == 1
    assert found["accuracy_shorter_won"]["value"] == 0
    a, b = random.normal(size=50), random.integers(0, 5, 50).astype(np.float64)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(spearman(a, np.ones(50)))


def test_thirds_by_length_have_bounds_that_hold():
    lengths = np.array([10.0, 20.0, 30.0, 40.0, 50.0, 61.0])
    names = length_thirds(lengths)
    assert list(dict.fromkeys(names)) == ["up to 26 characters", "27 to 43", "44 or more"]
    assert names == ["up to 26 characters"] * 2 + ["27 to 43"] * 2 + ["44 or more"] * 2


def test_slices_by_turn_are_named_once():
    def pair(turns: int, number: int) -> Preference:
        dialogue = [{"role": role, "content": f"{number}"} for role in ("user", "assistant")] * turns
        answers = ([{"role": "assistant", "content": text}] for text in "bc")
        return Preference(dialogue[:-1], *answers, "f:1", {"task": "t"})

    rows = [pair(turns, number) for turns in (1, 3, 7) for number in range(10)]
    wrong_at_3 = np.array([1.0] * 10 + [-1.0] * 10 + [1.0] * 10)
    found = slices(ScoredPairs(rows, wrong_at_3, np.zeros(30)), [], 50, 0)
    assert [each["slice"] for each in found["turn"]] == ["1", "3", "5 or later"]
    verdict = next(each for each in judge({"slices": found}) if each["line"] == "slices")
    assert verdict["reason"] == "worse than chance: turn 3"
