"""What an evaluation leaves behind, `results.json`: by what it is known to be the same one, and as tables. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table as Drawn

from align.config.evaluate import EvaluateRecipe
from align.errors import UserError
from align.runs.files import digest
from align.runs.manifest import differing_keys, read_manifest
from align.runs.tables import make_table

RESULTS = "results.json"
REPORT = "results.md"


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A table of text, for Markdown and for the screen."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def drawn(self) -> Drawn:
        """For the screen."""
        drawn = make_table(self.title, *self.columns)
        for row in self.rows:
            drawn.add_row(*row)
        return drawn


def identity(recipe: EvaluateRecipe) -> dict[str, Any]:
    """What makes two evaluations the same one, the rows themselves apart."""
    manifests = {name: read_manifest(path) for name, path in recipe.models.items()}
    plain = {
        **dataclasses.asdict(recipe),
        "models": list(recipe.models.items()),
    }  # the order of a mapping counts for nothing
    return {
        "stage": "evaluate",
        "recipe": json.loads(json.dumps(plain)),
        "inputs": {name: digest(manifest) for name, manifest in manifests.items() if manifest},
    }


def finished(recipe: EvaluateRecipe) -> dict[str, Any] | None:
    """The results of the same evaluation, if `output_dir` has them.

    Raises:
        UserError: it has those of another one, or of models that have since been made anew.
    """
    file = Path(recipe.output_dir) / RESULTS
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if differing := differing_keys(found, identity(recipe)):
        raise UserError(
            f"output_dir: {recipe.output_dir} holds results that differ in {', '.join(differing)}; delete the folder to "
            "evaluate anew, or choose another output_dir."
        )
    return found


def tables(recipe: EvaluateRecipe, results: dict[str, Any]) -> list[Table]:
    """The results as text: values by condition, comparisons, values by task."""
    several = len(recipe.num_shots) > 1 or recipe.num_shots != [0]

    def label(named: dict[str, Any]) -> str:
        return f"{named['model']}, {named['num_shots']}-shot" if several else str(named["model"])

    columns = list(dict.fromkeys(label(value) for value in results["results"]))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for value in results["results"]:
        cells.setdefault((value["task"], value["n"], value["metric"]), {})[label(value)] = _with_interval(value)
    whole = [[metric, *(row[column] for column in columns)] for (task, _, metric), row in cells.items() if task is None]
    parts = [
        [task, str(n), metric, *(row[column] for column in columns)]
        for (task, n, metric), row in cells.items()
        if task is not None
    ]
    compared = [
        [
            entry["metric"],
            label(entry),
            label(entry["against"]),
            _with_interval(entry, "difference"),
            f"{entry['p_value']:.2g}",
        ]
        for entry in results["comparisons"]
    ]
    found = [Table("Results", ["metric", *columns], whole)]
    if compared:
        heads = ["metric", "model", "against", "difference", "p"]
        found.append(Table(f"Differences from {results['baseline']}, on the same rows", heads, compared))
    if parts:
        found.append(Table("Results by task", ["task", "rows", "metric", *columns], parts))
    return found


def _with_interval(entry: dict[str, Any], name: str = "value") -> str:
    if entry[name] is None:
        return "-"
    sign = "+" if name == "difference" else ""
    text = f"{entry[name]:{sign}.4g}"
    return text if entry["low"] is None else f"{text} [{entry['low']:.4g}, {entry['high']:.4g}]"
