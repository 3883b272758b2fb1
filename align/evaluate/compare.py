"""Compare language models on the same rows: `align evaluate`.

    align evaluate recipes/mine/4_evaluate.yaml
    deepspeed --num_gpus 8 --module align.evaluate recipes/mine/4_evaluate.yaml

Every model is tried with every number of worked examples in the prompt. Perplexity and token accuracy are those of
the reference responses, as exact means over their tokens; all other metrics, and the grader, judge what the model
writes itself. Each process holds the whole model and takes its share of the batches; which rows share a batch does not
depend on the number of processes. What a killed run has done of a model is not done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config.evaluate import EvaluateRecipe
from align.config.load import resolve_function
from align.data.rows import as_response
from align.engine.distributed import World, connect, disconnect
from align.errors import UserError
from align.evaluate.answers import Answers, answer, predicted
from align.evaluate.bootstrap import Floats, Measure
from align.evaluate.inputs import Condition, Inputs, prepare, shared_keys
from align.evaluate.metrics import TOKEN_METRICS, foreign_scores, load_metric, measure
from align.evaluate.report import Result, summarise, write_report
from align.evaluate.results import REPORT, finished, identity
from align.maths.perplexity import perplexity
from align.models.virtual_tokens import load_language_model
from align.runs.files import digest, write_json
from align.runs.manifest import COSMETIC_KEYS
from align.runs.progress import Display
from align.runs.quiet import quiet
from align.runs.tables import make_console
from reward_models.functions import FunctionReward
from reward_models.responses import Responses

PARTS = "parts"  # in output_dir while the command runs: a file per condition that is done


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Evaluate; returns what is in `results.json`, on rank 0 (elsewhere nothing)."""
    quiet()
    if (found := finished(recipe)) is not None:
        print(f"{recipe.output_dir}: evaluated already; see {REPORT} there", file=sys.stderr)
        return found
    own = identity(recipe)
    metrics = {name: load_metric(name, TOKEN_METRICS) for name in recipe.metrics if name not in TOKEN_METRICS}
    grader = resolve_function(recipe.grader, "grader") if recipe.grader else None
    generates = bool(metrics) or grader is not None
    inputs = prepare(recipe, generates)
    try:
        (Path(recipe.output_dir) / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir: cannot write to {recipe.output_dir} ({error.strerror}); choose another."
        ) from error
    world = connect(shared_keys(recipe))
    answers = _answer_all(recipe, inputs, world, generates, digest([_lasting(own), inputs.report]))
    results: dict[str, Any] = {}
    if world.is_main:
        found_all = [
            _judge(recipe, inputs, *pair, metrics, grader) for pair in zip(inputs.conditions, answers, strict=True)
        ]
        results = {**own, **summarise(recipe, inputs, found_all)}
        tables = write_report(recipe, inputs, found_all, results)
        shutil.rmtree(Path(recipe.output_dir) / PARTS)
        console = make_console()
        for table in tables:
            console.print(table.drawn())
    world.barrier()
    disconnect()
    return results


def _lasting(own: Mapping[str, Any]) -> list[Any]:
    recipe = {name: value for name, value in own["recipe"].items() if name not in COSMETIC_KEYS}
    return [recipe, own["inputs"]]


def _answer_all(recipe: EvaluateRecipe, inputs: Inputs, world: World, generates: bool, name: str) -> list[Answers]:
    """The answers of every condition, in their order: on rank 0.

    Args:
        name: of this evaluation of these rows, by which a part that an earlier run left is known.
    """
    conditions = inputs.conditions
    files = [Path(recipe.output_dir) / PARTS / f"{number}.json" for number in range(len(conditions))]
    parts = [_read_part(file, name) if world.is_main else None for file in files]
    absent = world.sum(torch.tensor([world.is_main and part is None for part in parts], device=world.device).long())
    todo = [number for number, missing in enumerate(absent.tolist()) if missing]
    display = Display("evaluate", len(conditions) * len(inputs.rows)) if world.is_main else None
    done = (len(conditions) - len(todo)) * len(inputs.rows)
    with contextlib.ExitStack() as stack:
        if display is not None:
            display.start(done)
            stack.callback(display.stop)
        for path, numbers in itertools.groupby(todo, key=lambda number: conditions[number].path):
            model = load_language_model(path, shared_keys(recipe), torch.bfloat16 if recipe.bf16 else torch.float32)
            model = model.to(world.device).eval()
            for number in numbers:
                condition = conditions[number]

                def tell(rows: int, before: int = done, condition: Condition = condition) -> None:
                    if display is not None:
                        display.update(before + rows, {condition.model: f"{condition.num_shots}-shot"})

                answers = answer(model, condition, recipe, world, generates, tell)
                done += len(inputs.rows)
                if world.is_main:
                    parts[number] = answers
                    write_json(files[number], {"name": name, **dataclasses.asdict(answers)})
            del model  # before the next one is loaded
    return [part for part in parts if part is not None]


def _read_part(file: Path, name: str) -> Answers | None:
    if not file.is_file():
        return None
    part = json.loads(file.read_text(encoding="utf-8"))
    return Answers(part["tokens"], part["ids"]) if part["name"] == name else None


def _judge(
    recipe: EvaluateRecipe,
    inputs: Inputs,
    condition: Condition,
    answers: Answers,
    metrics: Mapping[str, Any],
    grader: Callable[..., Any] | None,
) -> Result:
    """A condition's measures, by what they measure.

    Raises:
        UserError: a metric or the grader fails.
    """
    predictions = predicted(condition, answers)
    tokens = np.array(answers.tokens)
    result = Result(condition, predictions)
    for name in recipe.metrics:
        if name == "perplexity":
            result.measures.append(Measure(tokens[:, [0, 2]], _perplexity))
        elif name == "token_accuracy":
            result.measures.append(Measure(tokens[:, [1, 2]], _mean_of(name)))
        elif found := measure(metrics[name], inputs.rows, predictions, inputs.references):
            result.measures.append(found)
        else:
            result.others |= foreign_scores(name, metrics[name], predictions, inputs.references)
    if grader is not None:
        scores = _grade(recipe, inputs, condition, answers, predictions, grader)
        applies = ~np.isnan(scores)
        statistics = np.stack([np.where(applies, scores, 0.0), applies.astype(np.float64)], axis=1)
        result.measures.append(Measure(statistics, _mean_of(str(recipe.grader).partition(":")[2])))
    return result


def _perplexity(sums: Floats) -> dict[str, float]:
    return {"perplexity": perplexity(sums[0] / sums[1])}


def _mean_of(name: str) -> Callable[[Floats], dict[str, float]]:
    return lambda sums: {name: float(sums[0] / sums[1]) if sums[1] else math.nan}


def _grade(
    recipe: EvaluateRecipe,
    inputs: Inputs,
    condition: Condition,
    answers: Answers,
    predictions: list[str],
    grader: Callable[..., Any],
) -> Floats:
    """The grader's score of each prediction, [n]; NaN where it does not apply.

    It sees the rows as a reward function of PPO does: the row's own prompt without examples, and the columns of the
    data, the reference as `completion` among them.
    """
    names = dict.fromkeys(name for row in inputs.rows for name in row.extra)
    columns = {name: [row.extra.get(name) for row in inputs.rows] for name in names}
    columns.setdefault("completion", [row.completion for row in inputs.rows])
    prompts = [row.prompt for row in inputs.rows]
    completions = [as_response(prompt, text) for prompt, text in zip(prompts, predictions, strict=True)]
    batch = Responses(prompts, predictions, completions, condition.prompt_ids, answers.ids, columns)
    try:
        scores = FunctionReward(str(recipe.grader), grader).score(batch).double().numpy()
    except ValueError as error:  # the message names the function and the row
        raise UserError(f"grader: {error}") from error
    if scores.ndim != 1:
        raise UserError(f"grader: {recipe.grader} scores single tokens; expected one number per response.")
    if np.isnan(scores).all() or np.nanmin(scores) < 0 or np.nanmax(scores) > 1:
        raise UserError(f"grader: {recipe.grader} gave {_range(scores)}; expected numbers from 0 to 1, at least one.")
    return np.asarray(scores, dtype=np.float64)


def _range(scores: Floats) -> str:
    given = scores[~np.isnan(scores)]
    return f"numbers from {given.min():g} to {given.max():g}" if len(given) else "None to every row"
