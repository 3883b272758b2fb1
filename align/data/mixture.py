"""Mixing sources: how often each one's rows are used, and the share of each task.

Temperature-scaled mixing as in T5 (arXiv 1910.10683) and FLAN (arXiv 2109.01652): the rate of a source is proportional to
weight x rows^(1/T). Their cap on the rows of a source is `max_rows` here, which limits both the rows that are used and
the rows that count in the rate. The rows of an epoch are drawn once; every epoch has the same.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from align.data.rows import Row
from align.data.templates import TASK

Item = TypeVar("Item")
MAX_REPORTED_TASKS = 100  # tasks named in the report
MAX_LISTED_TASKS = 20  # tasks named in the printed line


def times_used(rows: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """How often each source's rows are used per epoch.

    The total, sum of weight x rows, is that of temperature 1; the shares are proportional to weight x rows^(1/temperature).
    """
    if temperature == 1:
        return list(weights)
    rates = [weight * count ** (1 / temperature) for weight, count in zip(weights, rows, strict=True)]
    total = sum(weight * count for weight, count in zip(weights, rows, strict=True))
    return [total * rate / sum(rates) / count if count else 0.0 for rate, count in zip(rates, rows, strict=True)]


def task_counts(training: Sequence[Row], evaluation: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Rows and share of each task, for the most frequent tasks only: a `task` column of the data may hold anything."""
    counts = [Counter(str(row.extra[TASK]) for row in side) for side in (training, evaluation)]
    return {
        task: {
            "train_rows": counts[0][task],
            "share": counts[0][task] / len(training) if training else 0.0,
            "evaluation_rows": counts[1][task],
        }
        for task, _ in (counts[0] + counts[1]).most_common(MAX_REPORTED_TASKS)
    }


def describe_task_shares(report: Mapping[str, Any]) -> str | None:
    """The tasks of `Rows.report` with their shares of the training rows, in one line; None if there is only one task."""
    counts = {task: each for task, each in report["tasks"].items() if each["train_rows"]}
    tasks = [f"{task} {each['share']:.1%} ({each['train_rows']} rows)" for task, each in counts.items()]
    more = f", and {len(tasks) - MAX_LISTED_TASKS} more" if len(tasks) > MAX_LISTED_TASKS else ""
    return ", ".join(tasks[:MAX_LISTED_TASKS]) + more if len(tasks) > 1 else None


def seeded_sample(items: Sequence[Item], count: int, seed: str) -> list[Item]:
    """A random sample of `count` items (all, if there are fewer), in their original order."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[index] for index in sorted(chosen)]


def repeat_rows(rows: list[Row], times: float, seed: str) -> list[Row]:
    """The rows `times` times; the fractional part is a seeded sample."""
    complete = int(times)
    return rows * complete + seeded_sample(rows, round((times - complete) * len(rows)), seed)
