"""Find faults of a run in its metrics, warnings and verdicts; a healthy run has none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.report.findings import Finding, severity_order
from align.report.read import EVALUATIONS, Run, is_run, read_run
from align.report.signs_ppo import ppo_signs
from align.report.signs_recorded import recorded_signs
from align.report.signs_responses import response_signs
from align.report.signs_training import reward_signs, training_signs


def diagnose(run: Run, others: Sequence[Run] = ()) -> list[Finding]:
    """The faults of a run, severe ones first.

    Args:
        others: runs of the same pipeline, among which the reward model of a PPO run is searched.
    """
    found: list[Finding] = []
    if broken := [name for name in _metric_names(run) if _became_nonfinite(run, name)]:
        found.append(
            Finding(
                "severe",
                "not finite",
                "numbers that are not finite",
                f"{', '.join(broken[:4])}{' and others' * (len(broken) > 4)} ended as NaN or infinity, at step "
                f"{run.lines[-1]['step']}.",
                "Lower `learning_rate`; see `bad_batches/` for the rows; with bf16 compare a run in float32.",
            )
        )
    if run.stage == "ppo":
        found += [*ppo_signs(run), *response_signs(run, reward_model_of(run, others))]
    elif run.stage in ("sft", "reward", "classify", "token-classification", "question-answering", "mlm"):
        found += training_signs(run)
        if run.stage == "reward":
            found += reward_signs(run)
    found += recorded_signs(run)
    if not run.finished and not run.lines and run.stage not in EVALUATIONS:
        found.append(
            Finding(
                "warning",
                "no metrics",
                "the run has logged nothing",
                "metrics.jsonl is missing or empty, and the run has not finished.",
                "Run the command again: it goes on, or names what stops it.",
            )
        )
    return sorted(found, key=severity_order)


def _metric_names(run: Run) -> list[str]:
    return sorted({name for line in run.lines for name in line} - {"step", "time"})


def _became_nonfinite(run: Run, name: str) -> bool:
    values = [line[name] for line in run.lines if name in line]
    return bool(values) and values[-1] is None and name.startswith(("train/loss", "eval/loss", "objective/", "policy/"))


def reward_model_of(run: Run, others: Sequence[Run]) -> Run | None:
    """The run of the reward stage whose model a PPO run used: in `others`, or in the folder that the recipe names."""
    path = run.recipe.get("reward_model_path")
    if isinstance(path, list) and len(path) == 1:  # an ensemble has several runs
        (path,) = path
    if not isinstance(path, str):
        return None
    name = Path(path).name
    for other in others:
        if other.stage == "reward" and other.name == name:
            return other
    for folder in (run.folder.resolve().parent / name, Path(path)):
        if is_run(folder):
            found = read_run(folder)
            return found if found.stage == "reward" else None
    return None
