"""What preference pairs give away beside the responses' quality: which is longer, which was shown first, and where they are from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.rows import Preference, is_tie, render_text
from align.data.strength import SHOWN_FIRST
from align.data.templates import TASK
from align.reward.evaluation import accuracy_by_source, pairs_accuracy, prompts_of
from align.runs.tables import markdown_table

SOURCE = "source"  # column by which pairs are told apart; without it, by the data set that they are from
# Agreement of researchers with crowd workers on single pairs (arXiv 2204.05862): a cue that predicts as well leaves nothing to learn
# but itself. Datasets on which length was most of what reward models learnt had 0.56 to 0.63 (arXiv 2310.03716).
AS_GOOD_AS_ANNOTATORS = 0.63


def measure_imbalance(rows: Sequence[Preference]) -> dict[str, Any]:
    """Shares, each with `low` and `high` of its 95% interval and `n`, of pairs that are no ties.

    Returns:
        `longer_chosen`, pairs whose chosen response has more characters (as many count 1/2); `chosen_first`, if rows have that
        column; `longer_chosen_by_source`, if there are several in the column `source`, or several data sets.
    """
    rows = [row for row in rows if not is_tie(row)]
    if not rows:
        return {}
    lengths = _lengths(rows, "chosen"), _lengths(rows, "rejected")
    prompts = prompts_of(rows)
    found: dict[str, Any] = {"longer_chosen": pairs_accuracy(lengths, range(len(rows)), prompts)}
    placed = [index for index, row in enumerate(rows) if row.extra.get(SHOWN_FIRST) in (True, False)]
    if placed:
        first = torch.tensor(
            [float(row.extra.get(SHOWN_FIRST) is True or row.extra.get(SHOWN_FIRST) == 1) for row in rows]
        )
        found["chosen_first"] = pairs_accuracy((first, 1 - first), placed, prompts)
    column = SOURCE if any(row.extra.get(SOURCE) for row in rows) else TASK
    if by_source := accuracy_by_source(rows, lengths, column):
        found["longer_chosen_by_source"] = by_source
    return found


def describe_imbalance(found: dict[str, Any], pairs: str = "training pairs") -> list[str]:
    """Lines on what `measure_imbalance` found in `pairs`."""
    lines = []
    if found:
        lines.append(f"the longer response is the chosen one in {_shown(found['longer_chosen'])} of the {pairs}")
    if "chosen_first" in found:
        lines.append(f"the chosen response was shown first in {_shown(found['chosen_first'])} of the {pairs}")
    if sources := found.get("longer_chosen_by_source"):
        total = sum(each["n"] for each in sources.values())
        shown = (f"{name} {each['n'] / total:.1%} (longer: {each['accuracy']:.1%})" for name, each in sources.items())
        lines.append(f"{pairs} by source: {', '.join(shown)}")
    return lines


def warn_of_imbalance(found: dict[str, Any], pairs: str = "training pairs") -> list[str]:
    """A line for each cue that predicts the choice in `pairs` as well as annotators agree with one another."""
    cues = {"longer_chosen": ("longer", "shorter"), "chosen_first": ("first", "second")}
    warnings = []
    for name, words in cues.items():
        share = found.get(name, {}).get("accuracy", 0.5)
        if max(share, 1 - share) >= AS_GOOD_AS_ANNOTATORS and not found[name]["low"] <= 0.5 <= found[name]["high"]:
            word = words[share < 0.5]
            warnings.append(
                f"choosing the {word} response is right in {max(share, 1 - share):.1%} of the {pairs}, at least as often as annotators agree "
                f"({AS_GOOD_AS_ANNOTATORS:.0%}, arXiv 2204.05862), so the reward model can learn that alone; add pairs of which "
                f"the {words[share > 0.5]} is better, and compare with the baselines of `align judge-reward`."
            )
    return warnings


def imbalance_section(found: dict[str, Any]) -> str:
    """The section of the model card."""
    if not found:
        return ""
    named = {"longer response chosen": found["longer_chosen"]}
    if "chosen_first" in found:
        named["chosen response shown first"] = found["chosen_first"]
    for source, each in found.get("longer_chosen_by_source", {}).items():
        named[f"longer response chosen, source {source}"] = each
    table = markdown_table(
        ["training pairs", "share", "95% from", "to", "pairs"],
        [[name, each["accuracy"], each["low"], each["high"], each["n"]] for name, each in named.items()],
    )
    return "\n".join(["\n## The pairs\n", table, *warn_of_imbalance(found)])


def _lengths(rows: Sequence[Preference], side: str) -> Tensor:
    return torch.tensor([float(len(render_text(getattr(row, side)))) for row in rows])


def _shown(share: dict[str, Any]) -> str:
    return f"{share['accuracy']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"
