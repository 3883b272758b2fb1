"""All measurements on preference pairs, for `align judge-reward` and the reward stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.rows import Preference, render_text
from align.judge.baselines import words_margins
from align.judge.length import compare_accuracy, length_metrics, longer_wins
from align.judge.pairs import mean_with_interval, pair_metrics
from align.judge.probes import run_probes
from align.judge.rows import ScoredPairs, Scorer
from align.judge.slices import slices
from align.judge.verdicts import MIN_PAIRS

MAX_ERRORS = 100


def measure_pairs(
    scored: ScoredPairs,
    scorer: Scorer,
    training: Sequence[Preference],
    *,
    slice_by: Sequence[str] = (),
    iterations: int,
    seed: int,
) -> dict[str, Any]:
    """Measure a reward on pairs; only the accuracy if fewer than `MIN_PAIRS` are not ties. Call on all ranks.

    Args:
        scored: pairs that the reward was not trained on.
        scorer: the reward, for probes.
        training: the pairs that it was trained on, for the bag-of-words baseline; empty if unknown.
        slice_by: columns by whose values accuracy is measured.
        iterations: bootstrap resamples.
    """
    outcomes = scored.outcomes
    decided = outcomes.decided
    card: dict[str, Any] = {"pairs": len(scored.rows)}
    if len(decided.margins) < MIN_PAIRS:
        accuracy = mean_with_interval(decided.right, decided.prompts, iterations, seed)
        return {**card, "metrics": {"accuracy": accuracy, "ties_in_data": int(outcomes.ties.sum())}}
    lengths = scored.lengths
    card["metrics"] = pair_metrics(outcomes, iterations, seed)
    card["baselines"] = {"longer wins": compare_accuracy(outcomes, longer_wins(lengths), iterations, seed)}
    if (words := words_margins(scored.rows, outcomes, training, seed)) is not None:
        card["baselines"]["words alone"] = {
            **compare_accuracy(outcomes, words[0], iterations, seed),
            "fitted_on": words[1],
        }
    card["length"] = length_metrics(outcomes, (scored.chosen, scored.rejected), lengths, iterations, seed)
    card["slices"] = slices(scored, slice_by, iterations, seed)
    card["probes"] = run_probes(scorer, scored.rows, iterations, seed)
    return card


def confident_errors(scored: ScoredPairs) -> list[dict[str, Any]]:
    """The `MAX_ERRORS` pairs with the most negative margins, most negative first."""
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
        for index in order[:MAX_ERRORS]
    ]
