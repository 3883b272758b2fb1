"""Keys of `align evaluate`, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.config.data_source import DataSource, check_template
from align.config.keys import (
    AT_LEAST_1,
    FROM_0_TO_BELOW_1,
    MAX_LENGTH,
    RESAMPLES,
    SEED,
    TOKENS,
    Where,
    check_function_name,
    check_ranges,
    key,
    required,
    reward_timeout,
    score_reasoning,
)
from align.config.recipe import Recipe
from align.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRecipe(Recipe):
    """`align evaluate`: comparison of models on the same rows, with and without examples in the prompt.

    Rows are read and split as in the training stages: with the same sources, `seed` and `eval_fraction`, the rows that
    a stage held out are evaluated.
    """

    output_dir: str = required("Folder for `results.json`, `results.md` and `predictions.jsonl`.")
    accept_changes: list[str] = key(
        [],
        "Keys such as eval_dataset, models or grader: what they name may have changed since the results in `output_dir`.",
    )
    seed: int = key(42, "Seed of splits, of the examples in prompts, of sampling and of resampling.", SEED)

    models: dict[str, str] = required(
        "Models to compare, the baseline first: a list of folders or hub ids, or a mapping of names to them.",
        "list of texts or mapping",
    )

    train_dataset: list[DataSource] = key(
        [], "Rows from which the examples of `num_shots` are drawn; not needed for an `eval_dataset` without examples."
    )
    eval_dataset: list[DataSource] = key(
        [], "Rows to evaluate; without it, the share that the training stages hold out."
    )
    eval_fraction: float = key(
        0.05, "Share of the prompts held out when there is no `eval_dataset`.", FROM_0_TO_BELOW_1
    )
    max_eval_rows: int | None = key(None, "Evaluate on at most this many rows.", AT_LEAST_1)
    on_bad_row: Literal["error", "skip"] = key(
        "error",
        "What to do with rows that cannot be used by one of the models, with one of `num_shots` or of `templates`: raise an "
        "error, or skip.",
    )

    metrics: list[str] = key(
        ["perplexity", "token_accuracy"],
        "perplexity, token_accuracy, bits_per_byte (of the reference), exact_match, accuracy, f1, bleu, rouge, chrf (of the "
        "prediction), or anything that `evaluate.load` accepts, such as the path of a metric script. accuracy and f1 "
        "compare labels, which they recover from templates.",
    )
    grader: str | None = key(
        None, "`module:function` with TRL's reward signature that gives each prediction a score from 0 to 1."
    )
    reward_timeout: float = reward_timeout()
    score_reasoning: bool = score_reasoning()
    num_shots: list[int] = key(
        [0], "Numbers of worked examples in the prompt; each model is evaluated with each of them."
    )
    templates: dict[str, dict[str, str]] = key(
        {},
        "Jinja templates by name, each as in a source's `templates`, over the columns of `eval_dataset` and `train_dataset`. Each "
        "row is written by each of them, and each model is evaluated with each: they are compared on the same rows.",
    )
    max_length: int | None = key(
        None,
        "Maximum tokens of examples, prompt and answer; longer rows are bad rows. By default the model's limit.",
        MAX_LENGTH,
    )
    max_new_tokens: int = key(128, "Maximum tokens of a prediction.", TOKENS)
    temperature: float = key(0.0, "0 is greedy decoding; above 0, sampling at this temperature.")
    stop_strings: list[str] = key([], "A prediction also ends before the first of these strings.")
    bootstrap_iters: int = key(1000, "Resamples of the rows for each interval and p-value.", RESAMPLES)


def check_evaluate_rules(recipe: EvaluateRecipe, where: Where) -> None:
    """The ranges of the numbers, and the rules between the keys.

    Raises:
        UserError: names the first broken rule.
    """
    if recipe.temperature < 0:
        raise UserError(f"{where('temperature')}: expected 0 (the likeliest token) or more, got {recipe.temperature}")
    check_ranges(recipe, where)
    if not recipe.models:
        raise UserError(f"{where('models')}: expected folders or hub ids of models, got none")
    if not recipe.train_dataset and not recipe.eval_dataset:
        raise UserError(
            f"{where('eval_dataset')}: expected rows to evaluate on, got no eval_dataset and no train_dataset"
        )
    if any(source.weight != 1 for source in recipe.eval_dataset):
        raise UserError(f"{where('eval_dataset')}: `weight` is for training rows; limit evaluation rows by `max_rows`.")
    if not recipe.metrics and recipe.grader is None:
        raise UserError(f"{where('metrics')}: expected names of metrics, or a `grader`, got neither")
    if recipe.grader is not None:
        check_function_name(recipe.grader, where("grader"))
    if "" in recipe.stop_strings:
        raise UserError(f"{where('stop_strings')}: expected text that ends a prediction, got an empty string")
    shots = recipe.num_shots
    if not shots or min(shots) < 0 or len(set(shots)) < len(shots):
        raise UserError(f"{where('num_shots')}: expected different numbers from 0, got {shots}")
    for name, template in recipe.templates.items():
        check_template(template, f"{where('templates')}.{name}")
    if recipe.templates and not recipe.eval_dataset:
        raise UserError(
            f"{where('templates')}: expected an `eval_dataset`: which rows a training stage holds out depends on its own template"
        )
    if max(shots) and not recipe.train_dataset:
        raise UserError(f"{where('train_dataset')}: expected rows that give the {max(shots)} examples, got none")
