"""The report of an SFT run: results before and after training, warnings, and the evaluations on the way as table and chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.data.duplicates import describe_duplicates
from align.maths.perplexity import perplexity
from align.runs.charts import draw
from align.runs.files import write_text
from align.runs.own_files import own
from align.runs.tables import markdown_table
from align.sft.best_checkpoint import FORGETTING, within_bound

MAX_HISTORY_ROWS = 20  # of the table of evaluations
LOSS_CHART = "losses.svg"  # in output_dir
Log = Mapping[str, float]

# Row labels of the table of results, and the logged metric that each shows.
RESULT_ROWS = {
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
HISTORY_COLUMNS = {"step": "step", **CURVES, "gap": "eval_gap", "forgetting %": FORGETTING}


def retention_lines(report: Mapping[str, Any], num_train: int, num_replayed: int) -> list[str]:
    """How many retention rows are measured and replayed, to print; empty without `retention`.

    Args:
        report: `Rows.report`.
        num_train, num_replayed: training rows, before packing and without replayed ones, and replayed rows.
    """
    if (retention := report.get("retention")) is None:
        return []
    rows = sum(source["rows"] for source in report["sources"] if source["used_for"] == "retention")
    line = f"retention: {retention['measured_rows']} of {rows} rows measured"
    if num_replayed:
        total = num_train + num_replayed
        line += f"; {num_replayed} of {total} training rows ({num_replayed / total:.1%}) replayed from {retention['replayable_rows']}"
    lines = [line]
    if dropped := report["train_rows_dropped_as_retention"]:
        lines.append(f"{dropped} training rows dropped, because retention measures their prompt")
    if num_replayed and (duplicates := describe_duplicates(retention)) is not None:
        lines.append(f"retention: {duplicates}")
    return lines


def sft_results(before: Log, after: Log, steps: int, eval_metrics: Sequence[str]) -> dict[str, Any]:
    """The stage's results, from the evaluation logs before and after training; if these are empty, only the steps.

    Args:
        eval_metrics: metrics of the responses, as named in the recipe.
    """
    results: dict[str, Any] = {"steps": steps, "table": []}
    if not after:
        return results
    logs = [{**log, "eval_perplexity": perplexity(log["eval_loss"])} for log in (before, after)]
    for log, suffix in zip(logs, ("_before", ""), strict=True):
        for name, value in log.items():
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second")):
                results[f"{name.replace('mean_token', 'token')}{suffix}"] = value
    prefixes = tuple(f"eval_{Path(metric).stem}" for metric in eval_metrics)  # a metric may log several values
    rows = RESULT_ROWS | {
        f"{name.removeprefix('eval_')} of the responses": name for name in after if name.startswith(prefixes)
    }
    results["table"] = [[label, logs[0].get(name), logs[1][name]] for label, name in rows.items() if name in logs[1]]
    return results


def forgetting_warning(
    after: Log, max_forgetting: float | None, best_step: int | None, load_best_model_at_end: bool
) -> str | None:
    """The warning that the saved model forgets more than `max_forgetting` percent; None if it does not."""
    if max_forgetting is None or within_bound(after, max_forgetting):
        return None
    which = "the last model"
    if load_best_model_at_end and best_step:
        which = f"no checkpoint is within it; the one that forgets least, of step {best_step},"
    return (
        f"max_forgetting: {max_forgetting:g}% was asked for: {which} is saved, which forgets {after[FORGETTING]:.3g}%. "
        "Lower learning_rate or the number of steps, replay more, or train an adapter."
    )


def history_section(history: Sequence[Log]) -> str:
    """A Markdown section with the evaluations, evenly thinned if many; empty if there were none during training."""
    if len(history) < 3:
        return ""
    last = len(history) - 1
    intervals = min(last, MAX_HISTORY_ROWS - 1)
    shown = sorted({round(index * last / intervals) for index in range(intervals + 1)})
    columns = {label: name for label, name in HISTORY_COLUMNS.items() if name in history[0]}
    rows = [[history[index].get(name) for name in columns.values()] for index in shown]
    chart = f"![Losses in nats per token over the steps]({LOSS_CHART})"
    return f"\n## Evaluations on the way\n\n{chart}\n\n{markdown_table(list(columns), rows)}\nThe last line is the saved model.\n"


def write_loss_chart(folder: str, history: Sequence[Log]) -> None:
    """Draw the losses of the evaluations as an SVG."""
    steps = [entry["step"] for entry in history]
    write_text(own(Path(folder) / LOSS_CHART), draw(steps, loss_curves(history), "nats per token"))


def loss_curves(history: Sequence[Log]) -> dict[str, list[float]]:
    """The losses that were evaluated, by label, one value per evaluation."""
    return {label: [entry[name] for entry in history] for label, name in CURVES.items() if name in history[0]}
