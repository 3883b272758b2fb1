"""Keys of `align judge-reward`, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.data_source import DataSource
from align.config.keys import (
    ABOVE_0,
    AT_LEAST_1,
    FROM_0_TO_BELOW_1,
    RESAMPLES,
    SEED,
    TOKENS,
    Range,
    Where,
    check_function_names,
    check_ranges,
    key,
    required,
    reward_timeout,
    score_reasoning,
)
from align.config.recipe import Recipe
from align.errors import UserError

AT_LEAST_2 = Range("at least 2", lambda value: value >= 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRewardRecipe(Recipe):
    """`align judge-reward`: report card for a reward model or a Python reward, on pairs that it has not seen.

    Rows are read and split as in the reward stage: with the same sources, `seed` and `eval_fraction`, the pairs that it
    held out are judged.
    """

    output_dir: str = required("Folder for `results.json`, `card.md` with its charts, and `confident_errors.jsonl`.")
    accept_changes: list[str] = key(
        [], "Keys such as eval_dataset: what they name may have changed since the results in `output_dir`."
    )
    seed: int = key(42, "Seed of splits, of samples and of resampling.", SEED)

    reward_model_path: str | None = key(
        None, "Reward model to judge: the output of the reward stage, or any sequence classifier with one label."
    )
    reward_funcs: list[str] = key(
        [],
        "Instead of `reward_model_path`: `module:function` rewards with TRL's signature, whose sum is judged; without a tokenizer, "
        "`completion_ids` are empty.",
    )
    second_reward_model_path: str | None = key(None, "Another reward model, with which the first is compared.")
    second_reward_funcs: list[str] = key(
        [], "Instead of `second_reward_model_path`: `module:function` rewards, whose sum is compared."
    )

    train_dataset: list[DataSource] = key(
        [], "Pairs that the reward was trained on; the bag-of-words baseline is fitted on them."
    )
    eval_dataset: list[DataSource] = key(
        [], "Pairs to judge it on; without it, the share of `train_dataset` that the reward stage holds out."
    )
    eval_fraction: float = key(
        0.05, "Share of the prompts held out when there is no `eval_dataset`.", FROM_0_TO_BELOW_1
    )
    max_eval_rows: int | None = key(None, "Judge on at most this many pairs.", AT_LEAST_1)
    benchmarks: list[DataSource] = key(
        [], "Files of RewardBench, RewardBench 2, RM-Bench or JudgeBench, recognized by their columns."
    )
    slice_by: list[str] = key(
        [], "Columns by whose values accuracy is shown, besides source, subset, margin, length and turn."
    )
    score_reasoning: bool = score_reasoning()
    reward_timeout: float = reward_timeout()

    samples_dataset: list[DataSource] = key(
        [],
        "Rows of `prompt` and `completion`, several of each prompt, among which the spread of scores is measured; with a column "
        "`rating`, a number from people, the agreement of the scores with it, too.",
    )
    policy_path: str | None = key(
        None, "Instead of `samples_dataset`: a language model that responds to the judged prompts."
    )
    num_prompts: int = key(64, "With `policy_path`: maximum number of prompts to respond to.", AT_LEAST_1)
    num_generations: int = key(8, "With `policy_path`: responses to each prompt.", AT_LEAST_2)
    response_length: int = key(64, "Maximum tokens of a response.", TOKENS)
    temperature: float = key(1.0, "With `policy_path`: sampling temperature.", ABOVE_0)

    bootstrap_iters: int = key(1000, "Resamples of the prompts for each interval and p-value.", RESAMPLES)


def check_judge_reward_rules(recipe: JudgeRewardRecipe, where: Where) -> None:
    """The ranges of the numbers, and the rules between the keys.

    Raises:
        UserError: names the first broken rule.
    """
    check_ranges(recipe, where)
    for prefix in ("", "second_"):
        path, functions = getattr(recipe, f"{prefix}reward_model_path"), getattr(recipe, f"{prefix}reward_funcs")
        check_function_names(functions, where(f"{prefix}reward_funcs"))
        if path and functions:
            raise UserError(f"{where(f'{prefix}reward_funcs')}: expected them or {prefix}reward_model_path, got both")
    if not recipe.reward_model_path and not recipe.reward_funcs:
        raise UserError(f"{where('reward_model_path')}: expected a reward model, or `reward_funcs`, got neither")
    if not (recipe.train_dataset or recipe.eval_dataset or recipe.benchmarks):
        raise UserError(
            f"{where('eval_dataset')}: expected pairs to judge on, got no eval_dataset, train_dataset or benchmarks"
        )
    if recipe.train_dataset and not recipe.eval_dataset and recipe.eval_fraction == 0:
        raise UserError(
            f"{where('eval_fraction')}: is 0, so that there are no pairs to judge on; set it above 0, or give an `eval_dataset`."
        )
    pairs = recipe.train_dataset or recipe.eval_dataset
    for name in ("second_reward_model_path", "second_reward_funcs", "policy_path", "slice_by"):
        if getattr(recipe, name) and not pairs:
            raise UserError(f"{where(name)}: needs pairs; give an `eval_dataset`")
    if recipe.policy_path and recipe.samples_dataset:
        raise UserError(f"{where('samples_dataset')}: expected it or policy_path, got both")
    for name in ("eval_dataset", "benchmarks", "samples_dataset"):
        for index, source in enumerate(getattr(recipe, name)):
            if source.weight != 1:
                raise UserError(f"{where(name)}[{index}].weight: is for training rows; limit these by `max_rows`.")
    for name in ("train_dataset", "eval_dataset", "benchmarks"):
        for index, source in enumerate(getattr(recipe, name)):
            if source.templates:
                raise UserError(
                    f"{where(name)}[{index}].templates: they produce prompts and completions, and pairs have `chosen` and "
                    "`rejected`; leave them out."
                )
