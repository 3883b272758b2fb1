"""Compare language models on the same rows: `align evaluate`.

    align evaluate recipes/mine/4_evaluate.yaml
    deepspeed --num_gpus 8 --module align.evaluate recipes/mine/4_evaluate.yaml

Every model is evaluated with every number of few-shot examples, under every template. Perplexity and token accuracy are exact means over the
tokens of the reference responses; all other metrics, and the grader, score generated responses. Each process holds a
full copy of the model and takes a share of the batches, whose composition does not depend on the number of processes.
A run that was killed resumes after the last setting (model, template and number of examples) that it finished.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config.evaluate import EvaluateRecipe
from align.data.rows import as_response
from align.data.templates import RENDERINGS
from align.engine.distributed import World, connect, disconnect
from align.engine.faults import during, removed
from align.engine.sharding import load_device
from align.engine.user_functions import user_function
from align.errors import BadFile, UserError
from align.evaluate.bootstrap import Floats, Measure
from align.evaluate.inputs import EvalInputs, EvalSetting, prepare_inputs
from align.evaluate.metrics import TOKEN_METRICS, external_scores, load_metric, measure
from align.evaluate.predict import ModelOutputs, decode_predictions, run_model
from align.evaluate.report import SettingResult, summarize, write_report
from align.evaluate.results import AGAIN, REPORT, finished
from align.maths.perplexity import perplexity
from align.models.virtual_tokens import load_language_model
from align.runs.files import digest, write_json
from align.runs.measurement import claim_measurement, print_finished, record_rows
from align.runs.output_folder import PARTS, one_run_per_folder, share
from align.runs.own_files import RUN, delete, own
from align.runs.progress import Display
from align.runs.quiet import quiet
from align.runs.records import TEXT, Record, is_count, is_number, list_of_lists, read_record
from align.runs.results import EvaluationResult
from align.runs.same_run import COSMETIC_KEYS
from align.runs.tables import make_console
from align.terminal import say
from reward_models.functions import FunctionReward
from reward_models.responses import Responses

PART_RECORD = Record(
    {
        "name": TEXT,
        "tokens": list_of_lists("a list of three numbers per row", is_number),
        "ids": list_of_lists("a list of token ids per row", is_count),
    },
    max_bytes=1 << 32,
)


@one_run_per_folder
def run(recipe: EvaluateRecipe) -> EvaluationResult | None:
    """Evaluate; returns the content of `results.json` on rank 0, None on the others."""
    quiet()
    if (earlier := finished(recipe)) is not None:
        print_finished(recipe, f"evaluated already; see {REPORT} there")
        return EvaluationResult.from_json(recipe.output_dir, earlier)
    evaluation = claim_measurement(recipe, AGAIN)
    metrics = {name: load_metric(name, TOKEN_METRICS) for name in recipe.metrics if name not in TOKEN_METRICS}
    grader = user_function(recipe.grader, "grader", recipe.reward_timeout) if recipe.grader else None
    generates = bool(metrics) or grader is not None
    inputs = prepare_inputs(recipe, generates)
    world = connect(deepspeed_files=False, reward_timeout=recipe.reward_timeout, tf32=recipe.tf32)
    folder = Path(recipe.output_dir)
    if world.is_main:
        own(folder / PARTS).mkdir(exist_ok=True)
    else:
        share(folder)
    evaluation = record_rows(recipe, evaluation, inputs.report, AGAIN)
    outputs = _run_models(recipe, inputs, world, generates, _resume_key(evaluation, inputs))
    result = None
    if world.is_main:
        references = inputs.references
        setting_results = [
            _measure_setting(recipe, setting, references[setting.template], own, metrics, grader)
            for setting, own in zip(inputs.settings, outputs, strict=True)
        ]
        results = {**evaluation, **summarize(recipe, inputs, setting_results)}
        tables = write_report(recipe.output_dir, inputs, setting_results, results)
        result = EvaluationResult.from_json(recipe.output_dir, results)
        delete(folder / PARTS)
        (folder / RUN).unlink()
        console = make_console()
        for table in tables:
            console.print(table.to_rich())
    world.barrier()
    disconnect()
    return result


def _resume_key(evaluation: Mapping[str, Any], inputs: EvalInputs) -> str:
    """A digest of what determines the outputs, so that a run resumes only from parts of the same evaluation."""
    recipe = {name: value for name, value in evaluation["recipe"].items() if name not in COSMETIC_KEYS}
    return digest([[recipe, evaluation["inputs"]], inputs.report])


def _run_models(
    recipe: EvaluateRecipe, inputs: EvalInputs, world: World, generates: bool, resume_key: str
) -> list[ModelOutputs]:
    """The outputs of each setting, in order, on rank 0. Writes each to a part file, and reads those that exist."""
    settings = inputs.settings
    files = [Path(recipe.output_dir) / PARTS / f"{number}.json" for number in range(len(settings))]
    parts = [_read_part(file, resume_key) if world.is_main else None for file in files]
    missing = world.sum(torch.tensor([world.is_main and part is None for part in parts], device=world.device).long())
    remaining = [number for number, is_missing in enumerate(missing.tolist()) if is_missing]
    display = Display("evaluate", len(settings) * len(inputs.rows)) if world.is_main else None
    done = (len(settings) - len(remaining)) * len(inputs.rows)
    with contextlib.ExitStack() as stack:
        if display is not None:
            display.start(done)
            stack.callback(display.stop)
        for path, numbers in itertools.groupby(remaining, key=lambda number: settings[number].path):
            model = load_language_model(
                path,
                dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
                attn_implementation=recipe.attn_implementation,
                trust_remote_code=recipe.trust_remote_code,
                device=load_device(world),
            )
            model = model.to(world.device).eval()
            for number in numbers:
                setting = settings[number]

                def show(rows: int, before: int = done, setting: EvalSetting = setting) -> None:
                    if display is not None:
                        display.update(before + rows, {setting.model: setting.condition})

                outputs = run_model(
                    model,
                    setting,
                    world,
                    max_new_tokens=recipe.max_new_tokens if generates else 0,
                    temperature=recipe.temperature,
                    seed=recipe.seed,
                    batch_size=recipe.per_device_eval_batch_size,
                    on_progress=show,
                )
                done += len(inputs.rows)
                if world.is_main:
                    parts[number] = outputs
                    part = {"name": resume_key, "tokens": outputs.token_statistics, "ids": outputs.response_ids}
                    if not files[number].parent.is_dir():
                        raise removed(Path(recipe.output_dir))
                    with during("records", files[number]):
                        write_json(files[number], part)
            del model  # before the next one is loaded
    return [part for part in parts if part is not None]


def _read_part(file: Path, resume_key: str) -> ModelOutputs | None:
    if not os.path.lexists(file):
        return None
    try:
        part = read_record(file, PART_RECORD)
    except BadFile as error:
        say(f"{error}; its setting is evaluated again")
        return None
    return ModelOutputs(part["tokens"], part["ids"]) if part["name"] == resume_key else None


def _measure_setting(
    recipe: EvaluateRecipe,
    setting: EvalSetting,
    references: list[str],
    outputs: ModelOutputs,
    metrics: Mapping[str, Any],
    grader: FunctionReward | None,
) -> SettingResult:
    """Predictions and measures of a setting, in the order of the recipe's metrics, the grader's last.

    Raises:
        UserError: a metric or the grader fails.
    """
    predictions = decode_predictions(setting, outputs.response_ids)
    tokens = np.array(outputs.token_statistics)
    result = SettingResult(setting, predictions)
    for name in recipe.metrics:
        if name == "perplexity":
            result.measures.append(Measure(tokens[:, [0, 2]], _perplexity))
        elif name == "bits_per_byte":
            sizes = [len(text.encode()) for text in references]
            result.measures.append(Measure(np.stack([tokens[:, 0] / math.log(2), sizes], axis=1), _mean(name)))
        elif name == "token_accuracy":
            result.measures.append(Measure(tokens[:, [1, 2]], _mean(name)))
        elif text_measure := measure(metrics[name], setting.demonstrations, predictions, references):
            result.measures.append(text_measure)
        else:
            result.external_scores |= external_scores(name, metrics[name], predictions, references)
    if grader is not None:
        scores = _grade(grader, setting, outputs.response_ids, predictions)
        applies = ~np.isnan(scores)
        statistics = np.stack([np.where(applies, scores, 0.0), applies.astype(np.float64)], axis=1)
        result.measures.append(Measure(statistics, _mean(grader.name.partition(":")[2])))
    return result


def _perplexity(sums: Floats) -> dict[str, float]:
    return {"perplexity": perplexity(sums[0] / sums[1])}


def _mean(name: str) -> Callable[[Floats], dict[str, float]]:
    return lambda sums: {name: float(sums[0] / sums[1]) if sums[1] else math.nan}


def _grade(
    grader: FunctionReward,
    setting: EvalSetting,
    response_ids: list[list[int]],
    predictions: list[str],
) -> Floats:
    """The grader's score of each prediction, [n]; NaN where it returned None.

    It is called as a reward function of PPO: with the row's own prompt, without examples, and the columns of the data,
    among them the reference as `completion`.

    Raises:
        UserError: it fails, or its scores are not numbers from 0 to 1.
    """
    columns_of_rows = dict.fromkeys(
        column for row in setting.demonstrations for column in row.extra if column != RENDERINGS
    )
    columns = {column: [row.extra.get(column) for row in setting.demonstrations] for column in columns_of_rows}
    columns.setdefault("completion", [row.completion for row in setting.demonstrations])
    prompts = [row.prompt for row in setting.demonstrations]
    completions = [as_response(prompt, text) for prompt, text in zip(prompts, predictions, strict=True)]
    prompt_ids = [row.prompt_ids for row in setting.rows]
    batch = Responses(prompts, predictions, completions, prompt_ids, response_ids, columns)
    try:
        scores = grader.score(batch).double().numpy()
    except ValueError as error:  # the message names the function and the row
        raise UserError(f"grader: {error}") from error
    if scores.ndim != 1:
        raise UserError(f"grader: {grader.name} scores single tokens; expected one number per response.")
    if np.isnan(scores).all() or np.nanmin(scores) < 0 or np.nanmax(scores) > 1:
        raise UserError(f"grader: {grader.name} returned {_range(scores)}; expected numbers from 0 to 1, at least one.")
    return np.asarray(scores, dtype=np.float64)


def _range(scores: Floats) -> str:
    numbers = scores[~np.isnan(scores)]
    return f"numbers from {numbers.min():g} to {numbers.max():g}" if len(numbers) else "None for every row"
