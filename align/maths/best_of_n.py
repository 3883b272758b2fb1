"""Best-of-n from N samples a prompt: unbiased estimates for every n up to N, and the exact law where it is known.

Samples are ranked by score; of equal scores the earlier sample is the better one, as when the first of the best is taken.
Numbers are float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expected_best(scores: Tensor, values: Tensor) -> Tensor:
    """Unbiased estimates of the value of the best of n samples by score, [P, N] for n = 1..N.

    sum_i C(i-1, n-1) / C(N, n) value_(i), where value_(i) is that of the sample with the i-th lowest score (arXiv
    2310.02743, equation 5): the mean over all sets of n of the N samples.

    Args:
        scores: [P, N], by which the best is chosen.
        values: [P, N], what is measured of it: another reward, or the scores themselves.
    """
    count = scores.shape[1]
    return values.double().gather(1, _ranked(scores)) @ _choices(count)[0].T


def expected_win_rate(scores: Tensor, values: Tensor) -> Tensor:
    """Unbiased estimates of how often the best of n by score has a higher value than one more sample, ties 1/2.

    The mean over all sets of n of the N samples and each sample outside the set, [P, N - 1] for n = 1..N - 1.

    Args:
        scores, values: as for `expected_best`.
    """
    count = scores.shape[1]
    ranked = values.double().gather(1, _ranked(scores))
    won = [(ranked[:, [i]] > ranked).double() + (ranked[:, [i]] == ranked).double() / 2 for i in range(count)]
    below = torch.stack(
        [each[:, :i].sum(dim=1) for i, each in enumerate(won)], dim=1
    )  # [P, N] wins against lower ranks
    above = torch.stack([each[:, i + 1 :].sum(dim=1) for i, each in enumerate(won)], dim=1)
    others = count - torch.arange(1, count, dtype=torch.float64)
    shares, without_one = _choices(count)
    return (above @ shares[:-1].T + below @ without_one[:-1].T) / others


def kl_bound(n: int) -> float:
    """Upper bound on KL(best of n || one sample), nats; reached where no two samples are equal (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def win_rate_bound(n: int) -> float:
    """Most that the best of n can win by score against one sample; reached where no two scores are equal."""
    return n / (n + 1)


def exact_law(probabilities: Tensor, scores: Tensor, n: int) -> Tensor:
    """Probability that the best of n is each of K outcomes, [K].

    F^n - F(-)^n of outcomes with one score, F being the probability of a score at most as high, shared by them in proportion
    to their probabilities.

    Args:
        probabilities: [K], of one sample.
        scores: [K].
    """
    p = probabilities.double()
    at_most = ((scores[None, :] <= scores[:, None]) * p).sum(dim=1).clamp(max=1.0)
    same = ((scores[None, :] == scores[:, None]) * p).sum(dim=1)
    return p / same * (at_most**n - (at_most - same).clamp(min=0.0) ** n)


def exact_kl(law: Tensor, probabilities: Tensor) -> float:
    """KL(law || probabilities) of two laws [K], nats; outcomes without probability count nothing."""
    return float(torch.special.xlogy(law.double(), law.double() / probabilities.double()).nansum())


def exact_win_rate(law: Tensor, probabilities: Tensor, scores: Tensor) -> float:
    """Probability that an outcome of `law` has a higher score than one of `probabilities`, ties 1/2."""
    won = (scores[:, None] > scores[None, :]).double() + (scores[:, None] == scores[None, :]).double() / 2
    return float(law.double() @ won @ probabilities.double())


def _ranked(scores: Tensor) -> Tensor:
    """Indices [P, N] of the samples of each prompt from the worst to the best."""
    last = scores.shape[1] - 1
    return last - scores.flip(1).argsort(dim=1, stable=True)


def _choices(count: int) -> tuple[Tensor, Tensor]:
    """C(i-1, n-1) / C(N, n) at [n - 1, i - 1], the share of sets of n whose best has rank i, [N, N]; and C(i-2, n-1) / C(N, n),
    the share of those that also lack one given sample of a lower rank.

    Args:
        count: N.
    """
    n, rank = torch.arange(1, count + 1, dtype=torch.float64)[:, None], torch.arange(1, count + 1, dtype=torch.float64)
    lower = ((rank - n) / (rank - 1).clamp(min=1.0)).clamp(min=0.0)  # from C(i-1, n-1) to C(i-2, n-1)
    from_last = torch.cat([n / count, lower[:, 1:].flip(1)], dim=1).cumprod(dim=1)  # C(N-1, n-1) / C(N, n) is n / N
    shares = from_last.flip(1)
    return shares, shares * lower
