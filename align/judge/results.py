"""`results.json` of `align judge-reward`: its schema, and its tables."""

from __future__ import annotations

from typing import Any

from align.config.judge_reward import JudgeRewardRecipe
from align.evaluate.results import Table
from align.judge.card import tables as card_tables
from align.runs.measurement import finished_measurement
from align.runs.records import MAPPING, TEXT, Kind, Record
from align.runs.schemas import IDENTITY, OF_IDENTITY

VERDICT = ("line", "verdict", "measured", "reason", "go_back_to")


def _is_card(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("verdicts"), list)
        and all(
            isinstance(each, dict) and all(isinstance(each.get(name), str) for name in VERDICT)
            for each in value["verdicts"]
        )
    )


AGAIN = "judge again"  # what a folder is deleted for
RESULTS_RECORD = Record(
    {**IDENTITY, "verdict": TEXT, "summary": TEXT, "card": Kind("a card with its verdicts", _is_card), "data": MAPPING},
    OF_IDENTITY,
    "restore the file from a copy, or delete the folder to judge again",
)


def finished(recipe: JudgeRewardRecipe) -> dict[str, Any] | None:
    """The content of `results.json` in `output_dir`; None when there is none.

    Raises:
        UserError: it is damaged, of another recipe, or a model, the data or a function has changed since.
    """
    return finished_measurement(recipe, RESULTS_RECORD, AGAIN)


def tables(results: dict[str, Any]) -> list[Table]:
    """The tables of the card."""
    return card_tables(results["card"])
