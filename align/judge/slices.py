"""Accuracy by source, subset, length, turn and any column of the data, and whether a slice differs from the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.data.rows import Preference
from align.data.templates import TASK
from align.errors import UserError, nearest
from align.evaluate.bootstrap import Floats
from align.judge.pairs import interval, share
from align.judge.rows import Scored

MOST_VALUES, FEWEST_PAIRS = 20, 10  # shown of a column; the others are put together
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


def slices(scored: Scored, names: Sequence[str], iterations: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """By column, accuracy of each slice of the decided pairs and its difference from that of the other pairs."""
    outcomes = scored.outcomes
    decided = np.flatnonzero(~outcomes.ties)
    rows = [scored.rows[index] for index in decided]
    right, prompts = outcomes.right[decided], outcomes.prompts[decided]
    longest = np.maximum(*scored.lengths)[decided]
    columns = {
        "source": [_value(row.extra.get(TASK)) for row in rows],
        **{name: [_value(row.extra.get(name)) for row in rows] for name in dict.fromkeys(["subset", *names])},
        "length": thirds(longest),
        "turn": [_turn(row) for row in rows],
    }
    found = {}
    for name, values in columns.items():
        common = [value for value, n in Counter(values).most_common(MOST_VALUES) if n >= FEWEST_PAIRS]
        places = np.array([value if value in common else OTHERS for value in values])
        if name == "length":
            common.sort(key=lambda each: longest[places == each].min())
        elif name == "turn":
            common.sort()
        kept = [*common, *([OTHERS] if OTHERS in places else [])]
        if len(kept) > 1:
            found[name] = [_slice(each, places == each, right, prompts, iterations, seed) for each in kept]
    return found


def _slice(value: str, inside: Any, right: Floats, prompts: Any, iterations: int, seed: int) -> dict[str, Any]:
    statistics = np.column_stack([right * inside, inside, right * ~inside, ~inside]).astype(np.float64)

    def difference(sums: Floats) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without the slice
            return float(sums[0] / sums[1] - sums[2] / sums[3])

    return {
        "slice": value,
        "accuracy": share(right[inside], prompts[inside], iterations, seed),
        "less_the_rest": interval(statistics, difference, prompts, iterations, seed),
    }


def thirds(lengths: Floats) -> list[str]:
    """The third of the pairs that each belongs to by the characters of its longer response."""
    low, high = (int(each) for each in np.quantile(lengths, [1 / 3, 2 / 3])) if len(lengths) else (0, 0)
    names = (f"up to {low} characters", f"{low + 1} to {high}", f"{high + 1} or more")
    return [names[int(length > low) + int(length > high)] for length in lengths]


def _turn(row: Preference) -> str:
    if isinstance(row.prompt, str):
        return "text"
    turns = sum(message["role"] == "user" for message in row.prompt)
    return f"turn {turns}" if turns < 5 else "turn 5 or later"


def _value(value: Any) -> str:
    return "(none)" if value is None else str(value)[:60]
