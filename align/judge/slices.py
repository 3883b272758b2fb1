"""Accuracy by source, subset, margin, length, turn and the columns of `slice_by`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.data.rows import Preference
from align.data.templates import TASK
from align.errors import UserError, nearest
from align.evaluate.bootstrap import Floats
from align.judge.pairs import mean_with_interval, score_with_interval
from align.judge.rows import ScoredPairs

MAX_VALUES, MIN_SLICE_PAIRS = 20, 10  # of a column; other values, and smaller slices, are put together
OTHERS = "(others)"


def check_columns(rows: Sequence[Preference], names: Sequence[str]) -> None:
    """Check that the columns of `slice_by` exist.

    Raises:
        UserError: one does not.
    """
    columns = dict.fromkeys(name for row in rows for name in row.extra)
    for name in names:
        if name not in columns:
            raise UserError(f"slice_by: no column {name!r} in the pairs{nearest(name, columns)}")


def slices(scored: ScoredPairs, names: Sequence[str], iterations: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """For each column, the accuracy of each slice and its difference from the other pairs; ties are left out."""
    outcomes = scored.outcomes
    decided = np.flatnonzero(~outcomes.ties)
    rows = [scored.rows[index] for index in decided]
    right, prompts = outcomes.right[decided], outcomes.prompts[decided]
    longest = np.maximum(*scored.lengths)[decided]
    columns = {
        "source": [_label(row.extra.get(TASK)) for row in rows],
        **{name: [_label(row.extra.get(name)) for row in rows] for name in dict.fromkeys(["subset", "margin", *names])},
        "length": length_thirds(longest),
        "turn": [_turn_label(row) for row in rows],
    }
    found = {}
    for name, values in columns.items():
        common = [value for value, n in Counter(values).most_common(MAX_VALUES) if n >= MIN_SLICE_PAIRS]
        places = np.array([value if value in common else OTHERS for value in values])
        if name == "length":
            common.sort(key=lambda each: longest[places == each].min())
        elif name == "turn":
            common.sort()
        kept = [*common, *([OTHERS] if OTHERS in places else [])]
        if len(kept) > 1:
            found[name] = [_measure_slice(each, places == each, right, prompts, iterations, seed) for each in kept]
    return found


def _measure_slice(value: str, inside: Any, right: Floats, prompts: Any, iterations: int, seed: int) -> dict[str, Any]:
    statistics = np.column_stack([right * inside, inside, right * ~inside, ~inside]).astype(np.float64)

    def difference(sums: Floats) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without the slice
            return float(sums[0] / sums[1] - sums[2] / sums[3])

    return {
        "slice": value,
        "accuracy": mean_with_interval(right[inside], prompts[inside], iterations, seed),
        "less_the_rest": score_with_interval(statistics, difference, prompts, iterations, seed),
    }


def length_thirds(lengths: Floats) -> list[str]:
    """The name of each pair's third by length.

    Args:
        lengths: [n], characters of the longer response.
    """
    low, high = (int(each) for each in np.quantile(lengths, [1 / 3, 2 / 3])) if len(lengths) else (0, 0)
    names = (f"up to {low} characters", f"{low + 1} to {high}", f"{high + 1} or more")
    return [names[int(length > low) + int(length > high)] for length in lengths]


def _turn_label(row: Preference) -> str:
    if isinstance(row.prompt, str):
        return "text"
    turns = sum(message["role"] == "user" for message in row.prompt)
    return str(turns) if turns < 5 else "5 or later"


def _label(value: Any) -> str:
    return "(none)" if value is None else str(value)[:60]
