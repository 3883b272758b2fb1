"""Faults that the run itself has recorded: warnings, PPO's verdict against the SFT model, the verdict of a report card."""

from __future__ import annotations

from align.report.findings import Finding
from align.report.read import EVALUATIONS, Run
from align.runs.schemas import WARNINGS

NOT_BETTER = ("worse than", "no different from")  # beginnings of lines of PPO's verdict


def recorded_signs(run: Run) -> list[Finding]:
    """Findings from a run's own warnings and verdicts; the run may be unfinished."""
    warnings = [row.get("text") for row in run.samples if row["name"] == WARNINGS]
    found = [
        Finding("warning", "logged warning", "the run logged a warning", text, "See the warning.")
        for text in dict.fromkeys(warnings)
        if isinstance(text, str)
    ]
    if run.stage == "ppo":
        found += _ppo(run)
    if run.stage in EVALUATIONS and not run.finished:
        found.append(
            Finding(
                "warning",
                "no results",
                "there are no results yet",
                f"results.json is missing; {run.stage} logs no metrics while it runs.",
                "Wait for it; if it no longer runs, run the command again.",
            )
        )
    elif run.stage == "judge-reward" and run.record["verdict"] != "good":
        lines = run.record["card"]["verdicts"]
        remedies = dict.fromkeys(each["go_back_to"] for each in lines if each["verdict"] == run.record["verdict"])
        found.append(
            Finding(
                "severe" if run.record["verdict"] == "bad" else "warning",
                "reward card",
                f"the report card's verdict on the reward is {run.record['verdict']}",
                run.record["summary"],
                "Go back to " + "; ".join(filter(None, remedies)) if any(remedies) else "See card.md.",
            )
        )
    card = run.results.get("card")
    if run.stage == "reward" and isinstance(card, dict) and card.get("verdict") == "bad":
        found.append(
            Finding(
                "warning",
                "reward card",
                "the report card's verdict on the reward model is bad",
                f"{card.get('summary')}.",
                "See `card/card.md` in its folder, which names for each line the stage or data to go back to.",
            )
        )
    return found


def _ppo(run: Run) -> list[Finding]:
    found = [
        Finding(
            "warning",
            "no gain over SFT",
            "the policy is no better than the SFT model",
            line,
            "Keep the SFT model; look at the reward first (`align judge-reward`), then at `kl_coef` and `total_episodes`, or "
            "hold out more prompts (`eval_fraction`).",
        )
        for line in run.verdict
        if line.startswith(NOT_BETTER)
    ]
    if (run.results.get("best") or {}).get("update") == 0:
        found.append(
            Finding(
                "warning",
                "best is SFT",
                "best/ holds the SFT model",
                "No evaluation was better by metric_for_best_model (within max_kl, if it is set) than the SFT model's.",
                "Do not take `best/` for a trained policy; see what else is found, or train longer.",
            )
        )
    return found
