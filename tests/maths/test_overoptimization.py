"""The laws of arXiv 2210.10760, with peaks worked out by hand."""

from __future__ import annotations

import math

import pytest

from align.maths.overoptimization import best_of_n_peak, fit_rl_gain, rl_gain, rl_peak


def test_the_peaks_of_both_laws():
    assert best_of_n_peak(0.3, 0.05) == pytest.approx((3.0, 0.45))
    assert rl_peak(0.3, 0.05) == pytest.approx((148.413, 7.42066), rel=1e-5)


def test_the_peak_is_where_the_gain_is_highest():
    d, gain = rl_peak(0.5, 0.4)
    gains = [rl_gain(at, 0.5, 0.4) for at in (d - 0.1, d, d + 0.1)]
    assert max(gains) == gains[1]
    assert gains[1] == pytest.approx(gain)
    assert rl_gain(0.0, 0.5, 0.4) == 0.0, "d ln d is 0 at d = 0"


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.0), (0.5, -0.1), (100.0, 0.1)])
def test_a_gain_that_only_rises_has_no_peak(a, b):
    assert rl_peak(a, b) is None


def test_points_of_the_law_give_its_coefficients():
    d = [0.5, 1.0, 1.5, 2.0, 3.0]
    assert fit_rl_gain(d, [rl_gain(at, 1.2, 0.7) for at in d]) == pytest.approx((1.2, 0.7), abs=1e-5)
    # Two points by hand: gain(1) = a, gain(e) = e (a - b).
    assert fit_rl_gain([1.0, math.e], [2.0, math.e]) == pytest.approx((2.0, 1.0), abs=1e-9)
    assert fit_rl_gain([0.0, 1.0], [0.0, 2.0]) is None, "one point"
    assert fit_rl_gain([2.0, 2.0], [1.0, 1.1]) is None, "one distance"
    assert fit_rl_gain([2.0, 2.0 + 1e-9], [1.0, 1.1]) is None, "nearly one"
    assert fit_rl_gain([], []) is None
