"""What `align evaluate` asks of each model: every prompt in token ids, checked before any weights are loaded."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.base import StageRecipe
from align.config.evaluate import EvaluateRecipe
from align.config.stages import STAGES
from align.data.encode import encode_prompt, encode_response
from align.data.load import DataSettings, load_rows
from align.data.rows import BadRows, Demonstration, Turns, render_text
from align.errors import BadRow, UserError
from align.evaluate.few_shot import SEPARATOR, draw, ends_at_separator, pool_for, pools, with_examples
from align.models.load import is_encoder, load_config
from align.models.tokenizer import load_tokenizer
from align.models.virtual_tokens import prompt_tuning_base
from align.runs.manifest import read_manifest


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """A model with a number of examples in the prompt, and what it is asked: one entry per row."""

    model: str
    path: str
    num_shots: int
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Turns]  # with the examples
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]  # of the reference, end-of-text included
    stops: list[list[str]]  # a prediction ends before the first of these


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """The rows that every condition can use, in one order for all, and the conditions: by model, baseline first."""

    rows: list[Demonstration]
    conditions: list[Condition]
    report: dict[str, Any]  # of the data, as `align.data.load` reports it

    @property
    def references(self) -> list[str]:
        return [render_text(row.completion).strip() for row in self.rows]


def shared_keys(recipe: EvaluateRecipe) -> StageRecipe:
    """The keys that loading rows and models reads; what else a stage's recipe has is for training."""
    names = {field.name for field in dataclasses.fields(StageRecipe)} - {"stage"}
    own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(EvaluateRecipe)}
    return StageRecipe(**{name: value for name, value in own.items() if name in names})


def prepare(recipe: EvaluateRecipe, generates: bool) -> Inputs:
    """Read the rows and write every condition's prompts.

    Args:
        generates: whether the models are to write, rather than to judge the references only.

    Raises:
        UserError: no such model, no rows, fewer training rows than examples, or bad rows and `on_bad_row` is "error".
    """
    tokenizers = {name: _tokenizer(path, recipe) for name, path in recipe.models.items()}
    training, rows, report = _rows(recipe)
    if generates and (silent := next((row for row in rows if not row.prompt), None)):
        raise UserError(
            f"{silent.where}: plain text has no prompt to answer; measure it by perplexity and token_accuracy alone."
        )
    by_kind = pools(training)
    bad = BadRows()
    good = set(range(len(rows)))
    conditions = []
    for name, (tokenizer, limit) in tokenizers.items():
        for shots in recipe.num_shots:
            condition = Condition(name, recipe.models[name], shots, tokenizer, [], [], [], [])
            for index, row in enumerate(rows):
                examples = draw(pool_for(row, by_kind), shots, f"{recipe.seed} examples {index}")
                if index in good:
                    _add(condition, row, examples, recipe, generates, limit, bad)
                if len(condition.prompts) == index:  # bad: fill its place, to be taken out of all conditions
                    good.discard(index)
                    _append(condition, "", [], [], [])
            conditions.append(condition)
    report["bad_rows"] |= bad.raise_or_report(recipe.on_bad_row)
    if not good:
        raise UserError(
            f"none of {len(rows)} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    kept = sorted(good)
    report["evaluation_rows"] = len(kept)
    return Inputs([rows[index] for index in kept], [_only(condition, kept) for condition in conditions], report)


def _rows(recipe: EvaluateRecipe) -> tuple[list[Demonstration], list[Demonstration], dict[str, Any]]:
    """Rows for examples, rows to evaluate, and the report."""
    if recipe.train_dataset:
        settings = DataSettings(
            train_dataset=recipe.train_dataset,
            eval_dataset=recipe.eval_dataset,
            eval_fraction=recipe.eval_fraction,
            max_eval_rows=recipe.max_eval_rows,
            on_bad_row=recipe.on_bad_row,
            seed=recipe.seed,
        )
        rows = load_rows(settings, Demonstration)
        if not rows.evaluation:
            raise UserError("eval_fraction: expected rows to evaluate; raise it above 0, or give an `eval_dataset`.")
        return rows.train, rows.evaluation, rows.report
    settings = DataSettings(train_dataset=recipe.eval_dataset, on_bad_row=recipe.on_bad_row, seed=recipe.seed)
    rows = load_rows(settings, Demonstration)
    size = min(recipe.max_eval_rows or len(rows.train), len(rows.train))
    chosen = sorted(random.Random(f"{recipe.seed} evaluation").sample(range(len(rows.train)), size))
    sources = [{**source, "used_for": "evaluation"} for source in rows.report["sources"]]
    report = {**rows.report, "sources": sources, "train_rows": 0, "evaluation_rows": size}
    return [], [rows.train[index] for index in chosen], report


def _tokenizer(path: str, recipe: EvaluateRecipe) -> tuple[PreTrainedTokenizerBase, int]:
    """A model's tokenizer, and the most tokens that it can read."""
    shared = shared_keys(recipe)
    stage = (read_manifest(path) or {}).get("stage")
    if stage in STAGES and not STAGES[stage].generates:
        raise UserError(
            f"models: {path} was made by the {stage} stage and does not generate text; name a language model."
        )
    if found := prompt_tuning_base(path):
        base, before = found
        config = load_config(base, shared, f"models: {path} holds virtual tokens for {base}")
    else:
        before = 0
        config = load_config(path, shared, "models")
    if is_encoder(config) or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"models: {path} ({config.model_type}) is no decoder; name models that continue text.")
    tokenizer = load_tokenizer(path, dataclasses.replace(shared, chat_template_path=None))
    if not tokenizer.chat_template and recipe.chat_template_path:
        tokenizer = load_tokenizer(path, shared)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [tokenizer.model_max_length, *([positions - before] if positions else []), recipe.max_length]
    return tokenizer, min(limit for limit in limits if limit is not None)


def _add(
    condition: Condition,
    row: Demonstration,
    examples: list[Demonstration],
    recipe: EvaluateRecipe,
    generates: bool,
    limit: int,
    bad: BadRows,
) -> None:
    """Append a row to the condition, unless it is a bad one."""
    with bad.catch(row.where):
        prompt = with_examples(row, examples)
        ids = encode_prompt(condition.tokenizer, prompt)
        answer = encode_response(condition.tokenizer, prompt, row.completion)
        if len(answer) < 2:  # nothing but end-of-text
            raise BadRow("empty response")
        if not ids:  # text, and a tokenizer without BOS: what comes first is predicted by nothing
            ids, answer = answer[:1], answer[1:]
        size = len(ids) + max(len(answer), recipe.max_new_tokens if generates else 0)
        if size > limit:
            how = f" with {condition.num_shots} examples" if condition.num_shots else ""
            raise BadRow(f"longer than {limit} tokens{how} and its answer, which may take max_new_tokens")
        stops = [*recipe.stop_strings, *([SEPARATOR] if ends_at_separator(examples) else [])]
        _append(condition, prompt, ids, answer, stops)


def _append(condition: Condition, prompt: Turns, ids: list[int], answer: list[int], stops: list[str]) -> None:
    condition.prompts.append(prompt)
    condition.prompt_ids.append(ids)
    condition.answer_ids.append(answer)
    condition.stops.append(stops)


def _only(condition: Condition, kept: list[int]) -> Condition:
    names = ("prompts", "prompt_ids", "answer_ids", "stops")
    lists: dict[str, Any] = {name: [getattr(condition, name)[index] for index in kept] for name in names}
    return dataclasses.replace(condition, **lists)
