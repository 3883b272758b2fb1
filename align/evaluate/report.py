"""Write `results.json`, `results.md` and `predictions.jsonl`, and make the tables for the terminal."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.evaluate import EvaluateRecipe
from align.data.rows import render_text
from align.data.templates import TASK
from align.engine.faults import during
from align.evaluate.bootstrap import Measure, bootstrap_intervals, compare
from align.evaluate.costs import prompt_tokens, training_costs
from align.evaluate.inputs import EvalInputs, EvalSetting
from align.evaluate.metrics import TOKEN_METRICS
from align.evaluate.results import PER_TOKEN, REPORT, Table, tables
from align.runs.files import write_json, write_text
from align.runs.manifest import tokenizer_digest
from align.runs.markdown import markdown_text
from align.runs.output_folder import RESULTS
from align.runs.own_files import own
from align.runs.tables import markdown_table

PREDICTIONS = "predictions.jsonl"


@dataclasses.dataclass(slots=True)
class SettingResult:
    """Results of a setting.

    Attributes:
        external_scores: of metrics outside `align.evaluate.text_metrics`, which have no statistics per row.
    """

    setting: EvalSetting
    predictions: list[str]
    measures: list[Measure] = dataclasses.field(default_factory=list)
    external_scores: dict[str, float] = dataclasses.field(default_factory=dict)


def summarize(recipe: EvaluateRecipe, inputs: EvalInputs, results: Sequence[SettingResult]) -> dict[str, Any]:
    """Scores with intervals of each setting, over all rows and by task, comparisons, and what each setting costs."""
    tasks: dict[str | None, list[int]] = {None: list(range(len(inputs.rows)))}
    for index, row in enumerate(inputs.rows):
        tasks.setdefault(str(row.extra[TASK]), []).append(index)
    if len(tasks) == 2:  # a single task equals all rows
        tasks.popitem()
    values = [
        {**result.setting.label, "task": task, "n": len(rows), **value}
        for result in results
        for task, rows in tasks.items()
        for value in _values(result, rows, task, recipe.bootstrap_iters, recipe.seed)
    ]
    vocabularies = {tokenizer_digest(each.setting.tokenizer)["vocabulary"] for each in results}
    costs = {path: training_costs(path) for path in {each.setting.path for each in results}}
    return {
        "baseline": results[0].setting.model,
        "vocabularies": len(vocabularies),
        "rows": len(inputs.rows),
        "results": values,
        "comparisons": _comparisons(results, inputs.references, recipe.bootstrap_iters, recipe.seed),
        "costs": [
            {**each.setting.label, **costs[each.setting.path], "prompt_tokens": prompt_tokens(each.setting)}
            for each in results
        ],
        "data": inputs.report,
    }


def _values(
    result: SettingResult, rows: list[int], task: str | None, iterations: int, seed: int
) -> list[dict[str, Any]]:
    values = []
    for measure in result.measures:
        part = measure.rows(rows)
        intervals = bootstrap_intervals(part, iterations, seed)
        for name, value in part.scores().items():
            low, high = intervals[name]
            values.append({"metric": name, "value": _finite(value), "low": _finite(low), "high": _finite(high)})
    if task is None:
        values += [
            {"metric": name, "value": _finite(value), "low": None, "high": None}
            for name, value in result.external_scores.items()
        ]
    return values


def _comparisons(
    results: Sequence[SettingResult], references: Mapping[str | None, list[str]], iterations: int, seed: int
) -> list[dict[str, Any]]:
    """Each setting against the earlier ones of the baseline model (other models, few-shot against zero-shot, other templates),
    and of any model against those with as many examples under other templates.
    """
    baseline = results[0].setting.model
    vocabularies = {each.setting.path: tokenizer_digest(each.setting.tokenizer)["vocabulary"] for each in results}
    comparisons = []
    for number, result in enumerate(results):
        for other in results[:number]:
            mine, theirs = result.setting, other.setting
            if theirs.model not in (baseline, mine.model) or (
                theirs.model != baseline and theirs.num_shots != mine.num_shots
            ):
                continue
            if vocabularies[mine.path] != vocabularies[theirs.path]:
                incomparable = PER_TOKEN
            elif references[mine.template] != references[theirs.template]:
                incomparable = {*TOKEN_METRICS}
            else:
                incomparable = set()
            for measure, other_measure in zip(result.measures, other.measures, strict=True):
                if incomparable & set(measure.scores()):
                    continue
                for name, comparison in compare(measure, other_measure, iterations, seed).items():
                    numbers = {key: _finite(value) for key, value in dataclasses.asdict(comparison).items()}
                    against = other.setting.label
                    comparisons.append({"metric": name, **result.setting.label, "against": against, **numbers})
    return comparisons


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_report(
    output_dir: str, inputs: EvalInputs, setting_results: Sequence[SettingResult], results: dict[str, Any]
) -> list[Table]:
    """Write the three files; returns the tables. `results.json` is the last: it marks the evaluation as finished."""
    folder = Path(output_dir)
    report = tables(results)
    with during("records", folder):
        own(folder / PREDICTIONS, folder / REPORT, folder / RESULTS)
        write_text(folder / PREDICTIONS, "".join(_prediction_lines(inputs, setting_results)))
        text = f"# Evaluation\n\n{results['rows']} rows. 95% confidence intervals, by bootstrap over the rows.\n"
        text += "".join(
            f"\n## {markdown_text(table.title)}\n\n{markdown_table(table.columns, table.rows)}" for table in report
        )
        write_text(folder / REPORT, text)
        write_json(folder / RESULTS, results)
    return report


def _prediction_lines(inputs: EvalInputs, results: Sequence[SettingResult]) -> list[str]:
    """A JSON line per row and setting: prompt, prediction, reference, and the scores that a single row has."""
    lines = []
    references = inputs.references
    for index, row in enumerate(inputs.rows):
        for result in results:
            scores: dict[str, float | None] = {}
            for measure in result.measures:
                if measure.has_row_scores:
                    scores |= {name: _finite(value) for name, value in measure.rows([index]).scores().items()}
            line = {
                "row": row.where,
                "task": row.extra[TASK],
                **result.setting.label,
                "prompt": render_text(result.setting.rows[index].prompt),
                "prediction": result.predictions[index],
                "reference": references[result.setting.template][index],
                "scores": scores,
            }
            lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return lines
