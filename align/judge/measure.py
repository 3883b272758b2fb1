"""The measurements of a report card on preference pairs, shared by `align judge-reward` and the reward stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.rows import Preference, render_text
from align.judge.baselines import words_margins
from align.judge.length import against, length_metrics, longer_wins
from align.judge.pairs import pair_metrics, share
from align.judge.probes import run_probes
from align.judge.rows import Scored, Scorer
from align.judge.slices import slices
from align.judge.verdicts import FEWEST_PAIRS

MOST_ERRORS = 100


def measure_pairs(
    scored: Scored,
    scorer: Scorer,
    training: Sequence[Preference],
    *,
    slice_by: Sequence[str] = (),
    iterations: int,
    seed: int,
) -> dict[str, Any]:
    """All that is measured on pairs; of fewer than 30 that are no ties, their accuracy alone. For all ranks.

    Args:
        training: the pairs that the reward was trained on, for the words alone; empty if they are not known.
    """
    outcomes = scored.outcomes
    decided = outcomes.decided
    card: dict[str, Any] = {"pairs": len(scored.rows)}
    if len(decided.margins) < FEWEST_PAIRS:
        accuracy = share(decided.right, decided.prompts, iterations, seed)
        return {**card, "metrics": {"accuracy": accuracy, "ties_in_data": int(outcomes.ties.sum())}}
    lengths = scored.lengths
    card["metrics"] = pair_metrics(outcomes, iterations, seed)
    card["baselines"] = {"longer wins": against(outcomes, longer_wins(lengths), iterations, seed)}
    if (words := words_margins(scored.rows, outcomes, training, seed)) is not None:
        card["baselines"]["words alone"] = {
            **against(outcomes, words[0], iterations, seed),
            "fitted_on": words[1],
        }
    card["length"] = length_metrics(outcomes, (scored.chosen, scored.rejected), lengths, iterations, seed)
    card["slices"] = slices(scored, slice_by, iterations, seed)
    card["probes"] = run_probes(scorer, scored.rows, iterations, seed)
    return card


def confident_errors(scored: Scored) -> list[dict[str, Any]]:
    """The hundred pairs whose worse response has the highest score above the better one's, worst first."""
    margins, ties = scored.outcomes.margins, scored.outcomes.ties
    order = [index for index in margins.argsort(kind="stable") if margins[index] < 0 and not ties[index]]
    return [
        {
            "row": scored.rows[index].where,
            "margin": float(margins[index]),
            "prompt": render_text(scored.rows[index].prompt),
            "chosen": render_text(scored.rows[index].chosen),
            "rejected": render_text(scored.rows[index].rejected),
            "chosen_score": float(scored.chosen[index]),
            "rejected_score": float(scored.rejected[index]),
        }
        for index in order[:MOST_ERRORS]
    ]
