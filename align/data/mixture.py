"""How often each source's rows are used, and what share of the rows each task has.

Rates are those of T5 and FLAN, proportional to weight x rows^(1/T). These cap the rows that are used and the rows that
count in the rate; here `max_rows` is both: the rows of an epoch are drawn once, so a source never has other rows than
those that its rate gives it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from align.data.rows import Row
from align.data.templates import TASK

Item = TypeVar("Item")
MAX_REPORTED_TASKS = 100  # tasks that the report tells apart
MAX_LISTED_TASKS = 20  # of them that a line names


def times_used(rows: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """Times each source's rows are used: as often as `weights` say in all, in shares of weight x rows^(1/temperature)."""
    if temperature == 1:
        return list(weights)
    rates = [weight * count ** (1 / temperature) for weight, count in zip(weights, rows, strict=True)]
    total = sum(weight * count for weight, count in zip(weights, rows, strict=True))
    return [total * rate / sum(rates) / count if count else 0.0 for rate, count in zip(rates, rows, strict=True)]


def task_counts(training: Sequence[Row], evaluation: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Rows of each task, the most frequent ones: a column `task` of the data may say anything."""
    counts = [Counter(str(row.extra[TASK]) for row in side) for side in (training, evaluation)]
    return {
        task: {
            "train_rows": counts[0][task],
            "share": counts[0][task] / len(training),
            "evaluation_rows": counts[1][task],
        }
        for task, _ in (counts[0] + counts[1]).most_common(MAX_REPORTED_TASKS)
    }


def describe_task_shares(report: Mapping[str, Any]) -> str | None:
    """The tasks of `Rows.report` with their shares of the training rows, or None when there is but one."""
    counts = {task: each for task, each in report["tasks"].items() if each["train_rows"]}
    tasks = [f"{task} {each['share']:.1%} ({each['train_rows']} rows)" for task, each in counts.items()]
    more = f", and {len(tasks) - MAX_LISTED_TASKS} more" if len(tasks) > MAX_LISTED_TASKS else ""
    return ", ".join(tasks[:MAX_LISTED_TASKS]) + more if len(tasks) > 1 else None


def seeded_sample(items: Sequence[Item], count: int, seed: str) -> list[Item]:
    """`count` of the items (all when there are fewer), in their order."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[index] for index in sorted(chosen)]


def repeat_rows(rows: list[Row], weight: float, seed: str) -> list[Row]:
    whole = int(weight)
    return rows * whole + seeded_sample(rows, round((weight - whole) * len(rows)), seed)
