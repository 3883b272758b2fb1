"""Graders for tasks with verifiable answers: for `grader:` of `align evaluate`, and for `reward_funcs:` of PPO.

A grader has the signature of TRL's reward functions, `grader(prompts=..., completions=..., completion_ids=...,
**columns)`, and returns a number from 0 to 1 per row, or None where it does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Turns = str | list[dict[str, str]]  # text, or messages

# A minus without an operand before it is a sign. Commas between groups of three digits belong to the number.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)%.])-)?\$?(?P<inner>(?<=\$)-)?(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?P<part>\.[0-9]+)?"
    r"(?:/(?P<below>[0-9]+))?"
)


def numeric_answer(
    completions: Sequence[Turns],
    answer: Sequence[Any] | None = None,
    completion: Sequence[Any] | None = None,
    **_: Any,
) -> list[float | None]:
    """1.0 where a response's final number equals the reference's, else 0.0, as GSM8K is graded.

    The final number is the first one after the last `####`, or without that marker the last number of the text.
    Thousands separators, `$`, `%`, a final full stop and trailing zeros do not matter: "$1,234.50" equals 1234.5.

    Args:
        answer: column with the reference, text or a number; by default the column `completion`.

    Returns:
        One number per row; None where the reference has no number.

    Raises:
        ValueError: the data has neither column.
    """
    references = answer if answer is not None else completion
    if references is None:
        raise ValueError("numeric_answer: expected a column `answer` or `completion` with the correct answers")
    graded: list[float | None] = []
    for response, reference in zip(completions, references, strict=True):
        right = final_number(reference if isinstance(reference, str | list) else str(reference))
        graded.append(None if right is None else float(final_number(response) == right))
    return graded


def final_number(turns: Turns) -> Fraction | None:
    """The final number of a text, exactly; None if there is none (with a `####`: none after the last one)."""
    text = turns if isinstance(turns, str) else "\n\n".join(message["content"] for message in turns)
    text = text.replace("\N{MINUS SIGN}", "-")
    _, mark, marked = text.rpartition("####")
    found = [number for match in _NUMBER.finditer(marked if mark else text) if (number := _value(match)) is not None]
    if not found:
        return None
    return found[0] if mark else found[-1]


def _value(match: re.Match[str]) -> Fraction | None:
    if not match["whole"] and not match["part"]:
        return None
    number = Fraction(f"{(match['whole'] or '0').replace(',', '')}{match['part'] or ''}")
    if match["below"] and int(match["below"]):
        number /= int(match["below"])
    return -number if match["minus"] or match["inner"] else number
