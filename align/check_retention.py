"""What `align check` says of the rows that tell what is forgotten."""

from __future__ import annotations

from collections import Counter

from align.config import SFTRecipe
from align.data import Demonstration, Rows
from align.retention import Retention, replay_count
from align.sft_report import retention_lines


def described_retention(recipe: SFTRecipe, rows: Rows, retention: Retention) -> list[str]:
    """Where the retention rows come from and of which form they are, and what becomes of them."""
    if not recipe.retention:
        return []
    forms = Counter(map(_form, [*retention.measured, *retention.replayable]))
    sources = [each for each in rows.report["sources"] if each["used_for"] == "retention"]
    named = ", ".join(f"{each['source']} ({each['rows']} rows)" for each in sources)
    replayed = replay_count(recipe.replay_fraction, len(rows.train))
    lines = [f"retention rows: {named}; {', '.join(f'{count} of {form}' for form, count in forms.items())}"]
    return lines + retention_lines(rows.report, len(rows.train), replayed)


def _form(row: Demonstration) -> str:
    if not isinstance(row.completion, str):
        return "`messages`"
    return "`prompt` and `completion`" if row.prompt else "`text`"
