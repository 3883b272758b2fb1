"""`results.json` of an evaluation: its schema, and its tables. Does not import torch."""

from __future__ import annotations

import dataclasses
from types import NoneType
from typing import Any

from rich.table import Table as RichTable

from align.config.evaluate import EvaluateRecipe
from align.runs.measurement import finished_measurement
from align.runs.records import COUNT, MAPPING, TEXT, Kind, Record, is_count, is_number
from align.runs.schemas import IDENTITY, OF_IDENTITY
from align.runs.tables import make_table

REPORT = "results.md"
COSTS = {  # of a setting, with the heading of their columns
    "trained_parameters": "parameters trained",
    "training_seconds": "seconds of training",
    "train_tokens": "tokens trained on",
    "prompt_tokens": "tokens of a prompt",
}
PER_TOKEN = {"perplexity", "token_accuracy"}  # not comparable between tokenizers: their units differ


def _is_entry(value: Any, *numbers: str) -> bool:
    """A measurement or a difference of a model: where it was measured, and numbers or null under these names."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("model", "metric"))
        and is_count(value.get("num_shots"))
        and isinstance(value.get("template"), str | NoneType)
        and all(name in value and (value[name] is None or is_number(value[name])) for name in (*numbers, "low", "high"))
    )


def _are_values(value: Any) -> bool:
    return isinstance(value, list) and all(
        _is_entry(each, "value") and is_count(each.get("n")) and isinstance(each.get("task", 0), str | NoneType)
        for each in value
    )


def _are_comparisons(value: Any) -> bool:
    return isinstance(value, list) and all(
        _is_entry(each, "difference")
        and is_number(each.get("p_value"))
        and isinstance(against := each.get("against"), dict)
        and isinstance(against.get("model"), str)
        and is_count(against.get("num_shots"))
        and isinstance(against.get("template"), str | NoneType)
        for each in value
    )


def _are_costs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("model"), str)
        and is_count(each.get("num_shots"))
        and isinstance(each.get("template"), str | NoneType)
        and all(name in each and (each[name] is None or is_number(each[name])) for name in COSTS)
        for each in value
    )


AGAIN = "evaluate again"  # what a folder is deleted for
RESULTS_RECORD = Record(
    {
        **IDENTITY,
        "baseline": TEXT,
        "rows": COUNT,
        "results": Kind("a list of measurements", _are_values),
        "comparisons": Kind("a list of differences", _are_comparisons),
        "data": MAPPING,
    },
    {**OF_IDENTITY, "costs": Kind("a list of costs", _are_costs)},
    "restore the file from a copy, or delete the folder to evaluate again",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A table of text, for Markdown and for the terminal."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def to_rich(self) -> RichTable:
        """The table for a terminal."""
        table = make_table(self.title, *self.columns)
        for row in self.rows:
            table.add_row(*row)
        return table


def finished(recipe: EvaluateRecipe) -> dict[str, Any] | None:
    """The content of `results.json` in `output_dir`; None when there is none.

    Raises:
        UserError: it is damaged, from another evaluation, or a model, the data or a function has changed since.
    """
    return finished_measurement(recipe, RESULTS_RECORD, AGAIN, _identity)


def _identity(results: dict[str, Any]) -> dict[str, Any]:
    """The identity in results; versions before `schema_version` named the models alone."""
    if "schema_version" in results:
        return results
    return {**results, "inputs": {f"models.{name}": each for name, each in results["inputs"].items()}}


def tables(results: dict[str, Any]) -> list[Table]:
    """Values by metric and model, differences from the baseline, and values by task where there are several.

    Args:
        results: content of `results.json`.
    """
    zero_shot = results["recipe"]["num_shots"] == [0]

    def label(entry: dict[str, Any]) -> str:
        shots = [] if zero_shot else [f"{entry['num_shots']}-shot"]
        template = [str(entry["template"])] if entry.get("template") is not None else []
        return ", ".join([str(entry["model"]), *shots, *template])

    metrics = list(dict.fromkeys(entry["metric"] for entry in results["results"]))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for entry in results["results"]:
        cells.setdefault((entry["task"], entry["n"], label(entry)), {})[entry["metric"]] = _with_interval(
            entry, "value"
        )
    costs = {label(entry): entry for entry in results.get("costs", [])}  # earlier versions have none
    known = [name for name in COSTS if any(entry[name] is not None for entry in costs.values())]
    overall: list[list[str]] = []
    by_task: list[list[str]] = []
    for (task, n, name), row in cells.items():
        values = [row.get(metric, "-") for metric in metrics]
        if task is None:
            overall.append([name, *values, *(_count(costs[name][cost]) for cost in known)])
        else:
            by_task.append([task, str(n), name, *values])
    differences = [
        [
            entry["metric"],
            label(entry),
            label(entry["against"]),
            _with_interval(entry, "difference"),
            f"{entry['p_value']:.2g}",
        ]
        for entry in results["comparisons"]
    ]
    title = "Results"
    measured = sorted(PER_TOKEN & {entry["metric"] for entry in results["results"]})
    if measured and results.get("vocabularies", 1) > 1:
        title += f"; {' and '.join(measured)}: not to be compared between models of different tokenizers, as bits_per_byte may"
    found = [Table(title, ["model", *metrics, *(COSTS[name] for name in known)], overall)]
    if differences:
        title = (
            f"Differences from {results['baseline']}, on the same rows; interval: bootstrap over the rows, p: random swaps "
            "of the two models' results. These are two tests, which may disagree near p = 0.05"
        )
        found.append(Table(title, ["metric", "model", "against", "difference", "p"], differences))
    if by_task:
        found.append(Table("Results by task", ["task", "rows", "model", *metrics], by_task))
    return found


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _with_interval(entry: dict[str, Any], key: str) -> str:
    if entry[key] is None:
        return "-"
    sign = "+" if key == "difference" else ""
    text = f"{entry[key]:{sign}.4g}"
    return (
        text if entry["low"] is None or entry["high"] is None else f"{text} [{entry['low']:.4g}, {entry['high']:.4g}]"
    )
