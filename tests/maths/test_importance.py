"""Importance weights against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch

from align.maths.importance import importance

# Two responses of two tokens and one of one: ratios p / q of 1, 4; 0.5, 0.5; 3.
LOG_RATIO = torch.tensor([[1.0, 4.0], [0.5, 0.5], [3.0, 100.0]]).log()
MASK = torch.tensor([[True, True], [True, True], [True, False]])


@pytest.mark.parametrize(
    ("mode", "expected", "cut"),
    [
        ("token_truncate", [[1, 2], [0.5, 0.5], [2, 0]], 2 / 5),
        ("token_mask", [[1, 0], [0.5, 0.5], [0, 0]], 2 / 5),
        ("sequence_truncate", [[2, 2], [0.25, 0.25], [2, 0]], 3 / 5),  # ratios of the responses: 4, 0.25, 3
        ("sequence_mask", [[0, 0], [0.25, 0.25], [0, 0]], 3 / 5),
    ],
)
def test_ratios_above_the_cap(mode, expected, cut):
    found = importance(LOG_RATIO, MASK, mode, 2.0)
    assert found.weights.tolist() == [pytest.approx(row) for row in expected]
    assert found.cut == pytest.approx(cut)
    flat = [
        weight
        for row, real in zip(expected, MASK.tolist(), strict=True)
        for weight, r in zip(row, real, strict=True)
        if r
    ]
    assert found.effective == pytest.approx(sum(flat) ** 2 / (5 * sum(weight**2 for weight in flat)))


def test_equal_probabilities_weigh_1():
    found = importance(torch.zeros(2, 3), torch.ones(2, 3).bool(), "sequence_truncate", 2.0)
    assert found.weights.eq(1).all()
    assert (found.cut, found.effective) == (0.0, 1.0)


def test_weights_that_are_all_left_out_have_no_effective_size():
    assert importance(torch.full((1, 2), math.log(9)), torch.ones(1, 2).bool(), "token_mask", 2.0).effective == 0
