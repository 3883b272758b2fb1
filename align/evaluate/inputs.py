"""Inputs of `align evaluate`: the rows and every model's prompts in token ids, checked before weights are loaded."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from align.config.evaluate import EvaluateRecipe
from align.config.judge_reward import JudgeRewardRecipe
from align.data.findings import print_note
from align.data.load import DataSettings, load_rows
from align.data.reasoning import scored_turns
from align.data.rows import BadRows, Demonstration, render_text
from align.data.templates import RENDERINGS
from align.data.turn_end import turn_end_note
from align.errors import BadRow, UserError
from align.evaluate.few_shot import draw_examples, example_pools, pool_for
from align.evaluate.reader import EncodedRow, encode_row, load_reader

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class EvalSetting:
    """A model, loaded from `path`, with a number of few-shot examples in each prompt.

    Attributes:
        template: name of the recipe's template that wrote the rows; None if the recipe has none.
        demonstrations: the rows as that template writes them, without examples.
        rows: the same, encoded.
    """

    model: str
    path: str
    num_shots: int
    template: str | None
    tokenizer: PreTrainedTokenizerBase
    demonstrations: list[Demonstration]
    rows: list[EncodedRow]

    @property
    def condition(self) -> str:
        """How the model is asked, in words."""
        return f"{self.num_shots}-shot" if self.template is None else f"{self.num_shots}-shot, {self.template}"

    @property
    def label(self) -> dict[str, Any]:
        """What tells the setting from the others, for a record: model, number of examples and, if there are some, template."""
        named = {"template": self.template} if self.template is not None else {}
        return {"model": self.model, "num_shots": self.num_shots, **named}


@dataclasses.dataclass(frozen=True, slots=True)
class EvalInputs:
    """The rows that every setting can use, in the order of each setting's `rows`.

    Attributes:
        rows: as the first template writes them.
        settings: by model, the baseline's first, then by template.
        report: of the data, from `align.data.load`.
    """

    rows: list[Demonstration]
    settings: list[EvalSetting]
    report: dict[str, Any]

    @property
    def references(self) -> dict[str | None, list[str]]:
        """The text of each row's completion, by template, as the baseline's tokenizer tells answers from reasoning."""
        baseline = [each for each in self.settings if each.model == self.settings[0].model]
        return {
            each.template: [
                render_text(scored_turns(each.tokenizer, row.completion)).strip() for row in each.demonstrations
            ]
            for each in baseline
        }


def prepare_inputs(recipe: EvaluateRecipe, generates: bool) -> EvalInputs:
    """Load the rows and encode the prompts of every setting.

    Args:
        generates: whether responses are generated, for which prompts must have room.

    Raises:
        UserError: a model is missing or cannot generate, there are no rows, fewer training rows than examples, or bad
            rows while `on_bad_row` is "error".
    """
    readers = {name: load_reader(path, recipe) for name, path in recipe.models.items()}
    training, rows, report = load_evaluation_rows(recipe, Demonstration)
    if generates and (plain := next((row for row in rows if not row.prompt), None)):
        raise UserError(
            f"{plain.where}: plain text has no prompt to respond to; evaluate it by perplexity and token_accuracy alone."
        )
    if any(not isinstance(row.prompt, str) for row in rows):
        for name, reader in readers.items():
            if note := turn_end_note(reader.tokenizer):
                print_note(f"{name}: {note}")
    max_new_tokens = recipe.max_new_tokens if generates else 0
    templates: list[str | None] = [*recipe.templates] or [None]
    written = _by_template(rows, len(templates))
    pools = [example_pools(each) for each in _by_template(training, len(templates))]
    bad = BadRows()
    usable = set(range(len(rows)))
    settings: list[tuple[str, int, int, list[EncodedRow | None]]] = []
    for name, number, num_shots in itertools.product(readers, range(len(templates)), recipe.num_shots):
        asked = name if templates[number] is None else f"{name}, template {templates[number]}"
        encoded: list[EncodedRow | None] = [None] * len(rows)
        for index, row in enumerate(written[number]):
            # The same rows are the examples under each template: pools are in one order, and drawn from by one seed.
            examples = draw_examples(pool_for(row, pools[number]), num_shots, f"{recipe.seed} examples {index}")
            if index in usable:
                with bad.catch(row.where):
                    if generates or "bits_per_byte" in recipe.metrics:
                        _check_reference(row)
                    encoded[index] = encode_row(
                        row, examples, asked, readers[name], max_new_tokens, recipe.stop_strings
                    )
                if encoded[index] is None:
                    usable.discard(index)
        settings.append((name, number, num_shots, encoded))
    report["bad_rows"] |= bad.raise_or_report(recipe.on_bad_row)
    if not usable:
        raise UserError(
            f"none of {len(rows)} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    report["evaluation_rows"] = len(usable)
    return EvalInputs(
        [rows[index] for index in sorted(usable)],
        [
            EvalSetting(
                name,
                recipe.models[name],
                num_shots,
                templates[number],
                readers[name].tokenizer,
                [written[number][index] for index in sorted(usable)],
                [row for index, row in enumerate(encoded) if index in usable and row is not None],
            )
            for name, number, num_shots, encoded in settings
        ],
        report,
    )


def load_evaluation_rows(
    recipe: EvaluateRecipe | JudgeRewardRecipe, row_type: type[T]
) -> tuple[list[T], list[T], dict[str, Any]]:
    """Training rows, evaluation rows, and the report of the data."""
    templates = recipe.templates if isinstance(recipe, EvaluateRecipe) else {}
    if recipe.train_dataset:
        settings = DataSettings(
            train_dataset=recipe.train_dataset,
            eval_dataset=recipe.eval_dataset,
            eval_fraction=recipe.eval_fraction,
            max_eval_rows=recipe.max_eval_rows,
            on_bad_row=recipe.on_bad_row,
            seed=recipe.seed,
        )
        rows = load_rows(settings, row_type, templates=templates)
        if not rows.evaluation:
            raise UserError(
                "eval_fraction: is 0, so that there are no rows to evaluate; set it above 0, or give an `eval_dataset`."
            )
        return rows.train, rows.evaluation, rows.report
    settings = DataSettings(train_dataset=recipe.eval_dataset, on_bad_row=recipe.on_bad_row, seed=recipe.seed)
    rows = load_rows(settings, row_type, "eval_dataset", templates)
    size = min(recipe.max_eval_rows or len(rows.train), len(rows.train))
    chosen = sorted(random.Random(f"{recipe.seed} evaluation").sample(range(len(rows.train)), size))
    sources = [{**source, "used_for": "evaluation"} for source in rows.report["sources"]]
    report = {**rows.report, "sources": sources, "train_rows": 0, "evaluation_rows": size}
    return [], [rows.train[index] for index in chosen], report


def _by_template(rows: Sequence[Demonstration], count: int) -> list[list[Demonstration]]:
    """The rows as each of `count` templates writes them, in the order of the templates."""
    return [[(row, *row.extra.get(RENDERINGS, ()))[number] for row in rows] for number in range(count)]


def _check_reference(row: Demonstration) -> None:
    if not isinstance(row.completion, str) and row.completion[-1].get("tool_calls"):
        raise BadRow("a tool call as the reference of a text; evaluate it by perplexity and token_accuracy alone")
