"""The strength of a preference, as judgments in steps give it, in terms of which response is better, by what margin, and ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.errors import BadRow

LARGEST = 3
SHOWN_FIRST = "chosen_first"
VERDICTS = {"A>>B": 2, "A>B": 1, "A=B": 0, "tie": 0, "B>A": -1, "B>>A": -2}  # A is `chosen`, B is `rejected`


def by_strength(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a preference pair with its `strength` applied.

    Above 0, `chosen` is better by that many steps; below 0, `rejected` is, and the two change places. The first step has the
    `margin` 0, each further one adds 1 to it; at 0 the pair is a `tie`. The row keeps the number of steps as `strength`. Where they
    change places, `chosen_first` (whether annotators were shown `chosen` first) changes, too.

    Raises:
        BadRow: a `strength` that is none, or a `margin` or `tie` beside it.
    """
    strength = values["strength"]
    if isinstance(strength, str):
        strength = VERDICTS.get("".join(strength.split()))
    if isinstance(strength, bool) or strength not in range(-LARGEST, LARGEST + 1):
        raise BadRow(f"`strength` is not a whole number from -{LARGEST} to {LARGEST}, or one of {', '.join(VERDICTS)}")
    if values.get("margin") is not None or values.get("tie") is not None:
        raise BadRow("a `strength` beside a `margin` or a `tie`, which follow from it; leave them out")
    steps = abs(int(strength))
    ordered = {**values, "strength": steps, **({"margin": steps - 1} if steps else {"tie": True})}
    if strength < 0:
        ordered["chosen"], ordered["rejected"] = values["rejected"], values["chosen"]
        if values.get(SHOWN_FIRST) in (True, False):
            ordered[SHOWN_FIRST] = not values[SHOWN_FIRST]
    return ordered
