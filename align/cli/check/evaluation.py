"""`align check` of a recipe for `align evaluate`: its models, rows, prompts and measures, without weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.text import Text

from align.cli.check.findings import Context, describe, writable
from align.cli.check.sample_rows import marked
from align.config.evaluate import EvaluateRecipe
from align.config.functions import resolve_function
from align.evaluate.inputs import EvalInputs, prepare_inputs
from align.evaluate.metrics import TOKEN_METRICS, load_metric
from align.evaluate.results import AGAIN, finished
from align.models.inspect_folder import inspect_inputs
from align.runs.measurement import check_measured_rows, unfinished_measurement
from align.runs.output_folder import find_mark


def check(recipe: EvaluateRecipe, context: Context) -> None:
    """Report what can be found out about a recipe without loading weights."""
    report, begun = context.report, None
    with report.part():
        mark = None if (done := finished(recipe)) else find_mark(recipe.output_dir)
        begun = None if done else unfinished_measurement(recipe, AGAIN)
        state = "is finished; the step would be skipped" if done else "which would be resumed" if mark else "new"
        report.say(f"output_dir: {writable(Path(recipe.output_dir))}, {state}")
    with report.part():
        for name in recipe.metrics:
            if name not in TOKEN_METRICS:
                load_metric(name, TOKEN_METRICS)
        if recipe.grader is not None:
            resolve_function(recipe.grader, "grader")
        graded = [f"the grader {recipe.grader}"] if recipe.grader else []
        report.say(f"measures: {', '.join([*recipe.metrics, *graded])}")
    with report.part():
        inspect_inputs(recipe, context.stand_ins)
        models = {name: str(context.stand_ins.get(Path(path).resolve(), path)) for name, path in recipe.models.items()}
        generates = recipe.grader is not None or any(name not in TOKEN_METRICS for name in recipe.metrics)
        inputs = prepare_inputs(dataclasses.replace(recipe, models=models), generates)
        if begun is not None:
            check_measured_rows(recipe, begun, inputs.report, AGAIN)
        for name, path in models.items():
            tokenizer = next(each.tokenizer for each in inputs.settings if each.model == name)
            report.say(f"model {name}: {path}, {describe(tokenizer)}")
        report.say(f"rows: {_counts(recipe, inputs)}")
        for line in _sample(inputs, generates):
            report.console.print(line, soft_wrap=True)


def _counts(recipe: EvaluateRecipe, inputs: EvalInputs) -> str:
    bad = "; ".join(f"{entry['count']} skipped: {reason}" for reason, entry in inputs.report["bad_rows"].items())
    text = f"{len(inputs.rows)} to evaluate on"
    if max(recipe.num_shots):
        text += f", {inputs.report['train_rows']} to take examples from"
    return text + (f"; {bad}" if bad else "")


def _sample(inputs: EvalInputs, generates: bool) -> list[Text]:
    """The first row of the baseline, by number of examples, with the reference marked, and how long rows are."""
    lines = [
        Text(f"  {each.condition} row: ", style="bold")
        + marked(
            each.tokenizer,
            each.rows[0].ids,
            [index >= each.rows[0].reference_start for index in range(len(each.rows[0].ids))],
        )
        for each in inputs.settings
        if each.model == inputs.settings[0].model
    ]
    longest = max(len(row.ids) for each in inputs.settings for row in each.rows)
    prediction = "the models write after the prompt" if generates else "nothing is written, the reference is judged"
    return [*lines, Text(f"  (marked: the reference; {prediction}; at most {longest} tokens)", style="dim")]
