"""Keys of a judge, a reward that training never sees, and of what is chosen by it: the best checkpoint, and an early stop.

Functions take the recipe of PPO, whose file imports this one.
"""

from __future__ import annotations

from typing import Any

from align.config.ensemble import canonical_path, ensemble_members
from align.config.keys import AT_LEAST_1, Where, key
from align.errors import UserError, nearest

SCORE, JUDGE, TRUE = "eval/score", "eval/judge", "eval/true/"


def judge_reward_model_path() -> Any:
    """The key `judge_reward_model_path`, of the stages that measure responses by a judge."""
    return key(
        None,
        "Reward model that training never sees (trained on other pairs, or from another backbone), by which responses to "
        "evaluation prompts are judged.",
    )


def judge_reward_funcs() -> Any:
    """The key `judge_reward_funcs`, of the same stages."""
    return key(
        [],
        "`module:function` rewards that training never sees; the judge score is their sum, with `judge_reward_model_path`.",
    )


def metric_for_best_model() -> Any:
    """The key `metric_for_best_model` of PPO."""
    return key(
        None,
        "Metric of the evaluation by which the best checkpoint is chosen: eval/judge, eval/true/<function> or eval/score; by "
        "default the first of these that the recipe measures.",
        before=lambda keys: SCORE if keys.get("eval_reward_funcs") else None,
    )


def early_stopping_patience() -> Any:
    """The key `early_stopping_patience` of PPO."""
    return key(
        None,
        "Stop after this many evaluations in a row whose `metric_for_best_model` is below its best, with the 95% interval of "
        "the difference.",
        AT_LEAST_1,
    )


def has_judge(recipe: Any) -> bool:
    """Whether evaluations measure a judge."""
    return bool(recipe.judge_reward_model_path or recipe.judge_reward_funcs)


def best_metrics(recipe: Any) -> list[str]:
    """The metrics that may choose the best checkpoint, the most trustworthy first; the first is the default."""
    return [*([JUDGE] if has_judge(recipe) else []), *(f"{TRUE}{name}" for name in recipe.eval_reward_funcs), SCORE]


def best_metric(recipe: Any) -> str:
    """The metric that chooses the best checkpoint."""
    return recipe.metric_for_best_model or best_metrics(recipe)[0]


def check_judge_rules(recipe: Any, where: Where) -> None:
    """The rules for the judge and what is chosen by it.

    Raises:
        UserError: names the first broken rule.
    """
    given = ("judge_reward_model_path", "judge_reward_funcs", "metric_for_best_model", "early_stopping_patience")
    used = next((name for name in given if getattr(recipe, name)), None)
    if used is not None and not recipe.eval_dataset and not recipe.eval_fraction:
        raise UserError(f"{where(used)}: is measured on evaluation prompts; set eval_dataset, or eval_fraction above 0")
    check_judge_is_another(recipe, where)
    known = best_metrics(recipe)
    if recipe.metric_for_best_model is not None and recipe.metric_for_best_model not in known:
        raise UserError(
            f"{where('metric_for_best_model')}: no metric {recipe.metric_for_best_model}"
            f"{nearest(recipe.metric_for_best_model, known)}; with this recipe the best checkpoint can be chosen by "
            f"{', '.join(known)}."
        )
    if recipe.early_stopping_patience is not None and recipe.eval_steps is None:
        raise UserError(f"{where('early_stopping_patience')}: counts the evaluations of `eval_steps`; set that too")


def check_judge_is_another(recipe: Any, where: Where) -> None:
    """Check that the judge is another reward than the one that is maximized.

    Raises:
        UserError: it is the same.
    """
    judge = recipe.judge_reward_model_path
    if judge and canonical_path(judge) in [
        canonical_path(each) for path in recipe.reward_model_path for each in ensemble_members(path)
    ]:
        raise UserError(
            f"{where('judge_reward_model_path')}: {recipe.judge_reward_model_path} is the reward that is trained on; a judge is "
            "one that training never sees"
        )
    if shared := next((name for name in recipe.judge_reward_funcs if name in recipe.reward_funcs), None):
        raise UserError(
            f"{where('judge_reward_funcs')}: {shared} is also in reward_funcs; a judge is a reward that training never sees"
        )
