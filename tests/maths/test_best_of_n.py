"""Best-of-n estimates against sets counted one by one, and the exact law of small ones by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import tensor

from align.maths.best_of_n import (
    exact_kl,
    exact_law,
    exact_win_rate,
    expected_best,
    expected_win_rate,
    kl_bound,
    win_rate_bound,
)

P = tensor([0.5, 0.3, 0.2])  # from the worst to the best
RANKS = tensor([1.0, 2.0, 3.0])


def test_the_mean_over_all_sets_of_n():
    """Coste et al. (arXiv 2310.02743), five samples worked by hand."""
    proxy, gold = tensor([[0.1, 0.4, 0.2, 0.9, 0.7]]), tensor([[1.0, 2.0, 3.0, 0.0, 5.0]])
    torch.testing.assert_close(expected_best(proxy, gold), tensor([[2.2, 2.2, 1.7, 1.0, 0.0]], dtype=torch.float64))


def best_of(row: tuple[int, ...], scores: list[float]) -> int:
    return max(sorted(row), key=lambda index: scores[index])


@pytest.mark.parametrize("step", [1.0, 100.0], ids=["ties", "no ties"])
def test_estimates_equal_brute_force(step):
    torch.manual_seed(0)
    scores, values = ((torch.randn(3, 6) * step).round() for _ in range(2))
    best, won = expected_best(scores, values), expected_win_rate(scores, values)
    assert best.shape == (3, 6)
    assert won.shape == (3, 5)
    for row, (score, value) in enumerate(zip(scores.tolist(), values.tolist(), strict=True)):
        for n in range(1, 7):
            chosen = [(best_of(each, score), each) for each in itertools.combinations(range(6), n)]
            assert best[row, n - 1].item() == pytest.approx(sum(value[i] for i, _ in chosen) / len(chosen))
            fights = [(value[i], value[j]) for i, each in chosen for j in range(6) if j not in each]
            if fights:
                wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in fights)
                assert won[row, n - 1].item() == pytest.approx(wins / len(fights))


def test_the_win_rate_by_distinct_scores_is_the_bound():
    scores = torch.randperm(9).double()[None]
    assert expected_win_rate(scores, scores)[0].tolist() == pytest.approx([win_rate_bound(n) for n in range(1, 9)])


def test_the_exact_law_of_a_discrete_choice():
    law = exact_law(P, RANKS, 2)
    assert law.tolist() == pytest.approx([0.25, 0.39, 0.36])
    assert exact_kl(law, P) == pytest.approx(0.1406, abs=5e-5)
    assert kl_bound(2) == pytest.approx(0.1931, abs=5e-5)
    assert exact_win_rate(law, P, RANKS) == pytest.approx(0.64)
    assert win_rate_bound(2) == pytest.approx(2 / 3)


def test_outcomes_with_one_score_share_its_law():
    """The worst is taken if both samples are it; the others are as likely as they are."""
    law = exact_law(P, tensor([1.0, 2.0, 2.0]), 2)
    assert law.tolist() == pytest.approx([0.25, 0.75 * 0.6, 0.75 * 0.4])


def test_many_equal_outcomes_reach_the_bound():
    count = 1000
    uniform = torch.full((count,), 1 / count)
    law = exact_law(uniform, torch.arange(float(count)), 4)
    assert exact_kl(law, uniform) == pytest.approx(kl_bound(4), abs=1e-3)
    assert kl_bound(1) == 0
    assert kl_bound(16) == pytest.approx(math.log(16) - 15 / 16)


def test_many_samples_keep_their_precision():
    """The estimates of the samples' own ranks 1..N are those of order statistics: (N + 1) n / (n + 1)."""
    ranks = torch.arange(1.0, 513.0)[None]
    want = [513 * n / (n + 1) for n in range(1, 513)]
    torch.testing.assert_close(expected_best(ranks, ranks)[0].tolist(), want, rtol=1e-10, atol=0)
