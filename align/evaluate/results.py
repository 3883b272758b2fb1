"""`results.json` of an evaluation: the identity by which it is recognized, and its numbers as tables. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from align.config.evaluate import EvaluateRecipe
from align.errors import OtherRun
from align.runs.files import digest
from align.runs.manifest import differing_keys, read_manifest
from align.runs.output_folder import RESULTS
from align.runs.tables import make_table

REPORT = "results.md"


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


def identity(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Stage, recipe, and digests of the models' manifests: two evaluations that agree in these are the same."""
    manifests = {name: read_manifest(path) for name, path in recipe.models.items()}
    values = {**dataclasses.asdict(recipe), "models": list(recipe.models.items())}  # a list, since the order counts
    return {
        "stage": "evaluate",
        "recipe": json.loads(json.dumps(values)),
        "inputs": {name: digest(manifest) for name, manifest in manifests.items() if manifest},
    }


def finished(recipe: EvaluateRecipe) -> dict[str, Any] | None:
    """The content of `results.json` in `output_dir`; None when there is none.

    Raises:
        UserError: it is from another evaluation, or a model has been trained again since.
    """
    file = Path(recipe.output_dir) / RESULTS
    if not file.is_file():
        return None
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if differing := differing_keys(results, identity(recipe)):
        raise OtherRun(
            f"output_dir: {recipe.output_dir} holds results that differ in {', '.join(differing)}; delete the folder to "
            "evaluate again, or set another output_dir."
        )
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """Values by metric and model, differences from the baseline, and values by task where there are several.

    Args:
        results: content of `results.json`.
    """
    zero_shot = results["recipe"]["num_shots"] == [0]

    def label(entry: dict[str, Any]) -> str:
        return str(entry["model"]) if zero_shot else f"{entry['model']}, {entry['num_shots']}-shot"

    columns = list(dict.fromkeys(label(entry) for entry in results["results"]))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for entry in results["results"]:
        row_key = (entry["task"], entry["n"], entry["metric"])
        cells.setdefault(row_key, {})[label(entry)] = _with_interval(entry, "value")
    overall: list[list[str]] = []
    by_task: list[list[str]] = []
    for (task, n, metric), row in cells.items():
        values = [metric, *(row[column] for column in columns)]
        if task is None:
            overall.append(values)
        else:
            by_task.append([task, str(n), *values])
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
    found = [Table("Results", ["metric", *columns], overall)]
    if differences:
        title = f"Differences from {results['baseline']}, on the same rows"
        found.append(Table(title, ["metric", "model", "against", "difference", "p"], differences))
    if by_task:
        found.append(Table("Results by task", ["task", "rows", "metric", *columns], by_task))
    return found


def _with_interval(entry: dict[str, Any], key: str) -> str:
    if entry[key] is None:
        return "-"
    sign = "+" if key == "difference" else ""
    text = f"{entry[key]:{sign}.4g}"
    return text if entry["low"] is None else f"{text} [{entry['low']:.4g}, {entry['high']:.4g}]"
