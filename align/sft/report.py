"""What the SFT stage says of its run: whether it learnt, overfitted and forgot, before and after and on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.sft import SFTRecipe
from align.data.duplicates import describe_duplicates
from align.maths.perplexity import perplexity
from align.runs.charts import draw
from align.runs.tables import markdown_table
from align.sft.best_checkpoint import FORGETTING, keeps

MOST_LINES = 20  # of the table of evaluations
PICTURE = "losses.svg"  # in output_dir
Log = Mapping[str, float]

# What the table of before and after says, the name of the number in the log, and what to do with it.
MEASURES = {
    "held-out loss (nats/token)": "eval_loss",
    "held-out perplexity": "eval_perplexity",
    "held-out token accuracy": "eval_mean_token_accuracy",
    "gap: held-out minus training loss (nats/token)": "eval_gap",
    "retention loss (nats/token)": "eval_retention_loss",
    "retention token accuracy": "eval_retention_token_accuracy",
    "forgetting (rise of the retention loss, %)": FORGETTING,
}
CURVES = {
    "held-out loss": "eval_loss",
    "loss on training rows": "eval_train_loss",
    "retention loss": "eval_retention_loss",
}
COURSE = {"step": "step", **CURVES, "gap": "eval_gap", "forgetting %": FORGETTING}


def retention_lines(report: Mapping[str, Any], target: int, replayed: int) -> list[str]:
    """What is measured for retention and what is replayed, for a person; nothing without `retention`.

    Args:
        report: `Rows.report`.
        target, replayed: training rows of the recipe's own, and replayed ones, before packing.
    """
    if (retention := report.get("retention")) is None:
        return []
    rows = sum(source["rows"] for source in report["sources"] if source["used_for"] == "retention")
    line = f"retention: {retention['measured_rows']} of {rows} rows measured"
    if replayed:
        share = replayed / (target + replayed)
        line += f"; {replayed} of {target + replayed} training rows ({share:.1%}) replayed from {retention['replayable_rows']}"
    lines = [line]
    if dropped := report["train_rows_dropped_as_retention"]:
        lines.append(f"{dropped} training rows dropped, because retention measures their prompt")
    if replayed and (repeated := describe_duplicates(retention)) is not None:
        lines.append(f"retention: {repeated}")
    return lines


def closing_numbers(before: Log, after: Log, steps: int, metrics: Sequence[str]) -> dict[str, Any]:
    """The stage's results, from the evaluation logs before and after training; without these, only the steps.

    Args:
        metrics: of the responses, as the recipe names them.
    """
    results: dict[str, Any] = {"steps": steps, "table": []}
    if not after:
        return results
    logs = [{**log, "eval_perplexity": perplexity(log["eval_loss"])} for log in (before, after)]
    for log, suffix in zip(logs, ("_before", ""), strict=True):
        for name, value in log.items():
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second")):
                results[f"{name.replace('mean_token', 'token')}{suffix}"] = value
    stems = tuple(f"eval_{Path(metric).stem}" for metric in metrics)  # with which the names of their numbers begin
    rows = MEASURES | {
        f"{name.removeprefix('eval_')} of the responses": name for name in after if name.startswith(stems)
    }
    results["table"] = [[words, logs[0].get(name), logs[1][name]] for words, name in rows.items() if name in logs[1]]
    return results


def bound_line(after: Log, best_step: int | None, recipe: SFTRecipe) -> str | None:
    """What to say when the saved model forgets more than `max_forgetting`; None when it does not."""
    if recipe.max_forgetting is None or keeps(after, recipe.max_forgetting):
        return None
    which = "the last model"
    if recipe.load_best_model_at_end and best_step:
        which = f"no checkpoint keeps to it; the one that forgets least, of step {best_step},"
    return (
        f"max_forgetting: {recipe.max_forgetting:g}% was asked for: {which} is saved, which forgets {after[FORGETTING]:.3g}%. "
        "Lower learning_rate or the number of steps, replay more, or train an adapter."
    )


def course(history: Sequence[Log]) -> str:
    """A Markdown section with the numbers of the evaluations, some of many; empty when there was none on the way."""
    if len(history) < 3:
        return ""
    last = len(history) - 1
    picked = sorted({round(index * last / min(last, MOST_LINES - 1)) for index in range(min(last, MOST_LINES - 1) + 1)})
    columns = {words: name for words, name in COURSE.items() if name in history[0]}
    rows = [[history[index].get(name) for name in columns.values()] for index in picked]
    picture = f"![Losses in nats per token over the steps]({PICTURE})"
    return f"\n## Evaluations on the way\n\n{picture}\n\n{markdown_table(list(columns), rows)}\nThe last line is the saved model.\n"


def write_picture(folder: str, history: Sequence[Log]) -> None:
    """Draw the losses of the evaluations, the retention loss beside the others."""
    steps = [entry["step"] for entry in history]
    (Path(folder) / PICTURE).write_text(draw(steps, curves(history), "nats per token"), encoding="utf-8")


def curves(history: Sequence[Log]) -> dict[str, list[float]]:
    """The losses that belong beside each other, by name, one value per evaluation."""
    return {words: [entry[name] for entry in history] for words, name in CURVES.items() if name in history[0]}
