"""From what was measured to `results.json`, `results.md`, `predictions.jsonl` and the tables on screen."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config.evaluate import EvaluateRecipe
from align.data.rows import render_text
from align.data.templates import TASK
from align.evaluate.bootstrap import Measure, compare, intervals
from align.evaluate.inputs import Condition, Inputs
from align.evaluate.results import REPORT, RESULTS, Table, tables
from align.runs.files import write_json
from align.runs.manifest import tokenizer_digest
from align.runs.tables import markdown_table

PREDICTIONS = "predictions.jsonl"
PER_TOKEN = {"perplexity", "token_accuracy"}  # of two tokenizers they are in different units


@dataclasses.dataclass(slots=True)
class Result:
    """What a condition came to: the predictions, measures of them and the references, and numbers without statistics."""

    condition: Condition
    predictions: list[str]
    measures: list[Measure] = dataclasses.field(default_factory=list)
    others: dict[str, float] = dataclasses.field(default_factory=dict)


def summarise(recipe: EvaluateRecipe, inputs: Inputs, results: Sequence[Result]) -> dict[str, Any]:
    """Values with intervals of each condition over all rows and by task, and comparisons with the baseline model."""
    tasks: dict[Any, list[int]] = {None: list(range(len(inputs.rows)))}
    for index, row in enumerate(inputs.rows):
        tasks.setdefault(str(row.extra[TASK]), []).append(index)
    if len(tasks) == 2:  # a single task is all there is
        tasks.popitem()
    values = [
        {**_named(result.condition), "task": task, "n": len(rows), **value}
        for result in results
        for task, rows in tasks.items()
        for value in _values(result, rows, task, recipe)
    ]
    return {
        "baseline": results[0].condition.model,
        "rows": len(inputs.rows),
        "results": values,
        "comparisons": _comparisons(recipe, results),
        "data": inputs.report,
    }


def _named(condition: Condition) -> dict[str, Any]:
    return {"model": condition.model, "num_shots": condition.num_shots}


def _values(result: Result, rows: list[int], task: str | None, recipe: EvaluateRecipe) -> list[dict[str, Any]]:
    values = []
    for measure in result.measures:
        part = measure.rows(rows)
        ranges = intervals(part, recipe.bootstrap_iters, recipe.seed)
        values += [
            {"metric": name, "value": _finite(value), "low": _finite(ranges[name][0]), "high": _finite(ranges[name][1])}
            for name, value in part.scores().items()
        ]
    if task is None:
        values += [
            {"metric": name, "value": _finite(value), "low": None, "high": None}
            for name, value in result.others.items()
        ]
    return values


def _comparisons(recipe: EvaluateRecipe, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each condition against those of the baseline model that come before it, so examples against none as well."""
    first = results[0].condition
    vocabularies = {each.condition.path: tokenizer_digest(each.condition.tokenizer)["vocabulary"] for each in results}
    found = []
    for number, result in enumerate(results):
        for other in results[:number]:
            if other.condition.model != first.model:
                continue
            alike = vocabularies[result.condition.path] == vocabularies[other.condition.path]
            for mine, theirs in zip(result.measures, other.measures, strict=True):
                if not alike and PER_TOKEN & set(mine.scores()):
                    continue
                for name, compared in compare(mine, theirs, recipe.bootstrap_iters, recipe.seed).items():
                    numbers = {key: _finite(value) for key, value in dataclasses.asdict(compared).items()}
                    found.append(
                        {"metric": name, **_named(result.condition), "against": _named(other.condition), **numbers}
                    )
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_report(
    recipe: EvaluateRecipe, inputs: Inputs, found: Sequence[Result], results: dict[str, Any]
) -> list[Table]:
    """Write the three files, `results.json` last: by it a finished evaluation is known. Returns the tables."""
    folder = Path(recipe.output_dir)
    report = tables(recipe, results)
    _write(folder / PREDICTIONS, "".join(_lines(inputs, found)))
    text = f"# Evaluation\n\n{results['rows']} rows. Intervals hold 95%, by bootstrap over the rows.\n"
    text += "".join(f"\n## {table.title}\n\n{markdown_table(table.columns, table.rows)}" for table in report)
    _write(folder / REPORT, text)
    write_json(folder / RESULTS, results)
    return report


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _lines(inputs: Inputs, found: Sequence[Result]) -> list[str]:
    """A line per row and condition: what was asked, written and right, and the scores that the row has of its own."""
    lines = []
    for index, row in enumerate(inputs.rows):
        for result in found:
            scores: dict[str, float | None] = {}
            for measure in result.measures:
                if measure.has_row_scores:
                    scores |= {name: _finite(value) for name, value in measure.rows([index]).scores().items()}
            line = {
                "row": row.where,
                "task": row.extra[TASK],
                **_named(result.condition),
                "prompt": render_text(result.condition.prompts[index]),
                "prediction": result.predictions[index],
                "reference": inputs.references[index],
                "scores": scores,
            }
            lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return lines
