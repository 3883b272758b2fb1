"""The frontier: estimates of the rewards of the best of n and the KL bound, for n = 1..N, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.best_of_n.progress import Sample
from align.best_of_n.results import ESTIMATES
from align.evaluate.bootstrap import Floats, Measure, bootstrap_intervals
from align.maths.best_of_n import expected_best, expected_win_rate, kl_bound, win_rate_bound


def frontier(
    groups: Sequence[Sequence[Sample]], names: Sequence[str], iterations: int, seed: int
) -> list[dict[str, Any]]:
    """An entry for each n = 1..N with the estimates over the prompts and their 95% intervals (`_low`, `_high`).

    `proxy` is the mean score of the best by score, `judge` its mean score by the judge, `length` its mean length in tokens.
    Win rates, by score and by judge, are against one more sample and need n < N. Missing estimates are None.

    Args:
        groups: the N samples of each prompt.
        names: a text for each prompt; prompts of the same text are resampled together.
        iterations: bootstrap resamples.
    """
    scores, lengths = _table(groups, lambda each: each.score), _table(groups, lambda each: len(each.ids))
    estimates = {
        "proxy": expected_best(scores, scores),
        "win_rate": expected_win_rate(scores, scores),
        "length": expected_best(scores, lengths),
    }
    if groups[0][0].judge is not None:
        judge = _table(groups, lambda each: each.judge)
        estimates |= {"judge": expected_best(scores, judge), "judge_win_rate": expected_win_rate(scores, judge)}
    found = {name: _means(values, names, iterations, seed) for name, values in estimates.items()}
    rows = []
    for n in range(1, scores.shape[1] + 1):
        row = {"n": n, "prompts": len(groups), "kl": kl_bound(n), "kl_is": "upper bound"}
        for name in ESTIMATES:
            means = found.get(name, [])
            row |= zip(
                (name, f"{name}_low", f"{name}_high"), means[n - 1] if n <= len(means) else [None] * 3, strict=True
            )
        rows.append({**row, "win_rate_bound": win_rate_bound(n)})
    return rows


def _table(groups: Sequence[Sequence[Sample]], of: Callable[[Sample], float | None]) -> Tensor:
    """A number for each sample, [P, N] float64. Samples of the same tokens have that of the first: other batches round otherwise."""
    firsts = [{tuple(sample.ids): of(sample) for sample in reversed(group)} for group in groups]
    rows = [[first[tuple(sample.ids)] for sample in group] for group, first in zip(groups, firsts, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def _means(values: Tensor, names: Sequence[str], iterations: int, seed: int) -> list[tuple[float, float, float]]:
    """Mean, low and high of each column of values [P, K], over prompts."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    statistics = np.zeros((len(places), values.shape[1] + 1))
    np.add.at(statistics, [places[name] for name in names], np.c_[values.numpy(), np.ones(len(values))])
    columns = [str(column) for column in range(values.shape[1])]

    def score(sums: Floats) -> dict[str, float]:
        return dict(zip(columns, (sums[:-1] / sums[-1]).tolist(), strict=True))

    measure = Measure(statistics, score)
    means: Mapping[str, float] = measure.scores()
    intervals = bootstrap_intervals(measure, iterations, seed)
    return [(means[column], *intervals[column]) for column in columns]
