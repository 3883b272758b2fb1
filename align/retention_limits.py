"""Keys of the SFT stage that measure what is forgotten and how it answers: how they depend on one another."""

from __future__ import annotations

from collections.abc import Callable

from align.config import SFTRecipe, UserError

OF_RETENTION = ("retention", "forgetting")  # how the names of metrics begin that need `retention`


def check_retention(recipe: SFTRecipe, where: Callable[[str], str]) -> None:
    """Refuse what could not be measured, or would not be read.

    Raises:
        UserError: the first thing that is wrong.
    """
    evaluated = bool(recipe.eval_dataset) or recipe.eval_fraction > 0
    for name in ("replay_fraction", "max_forgetting"):
        if getattr(recipe, name) and not recipe.retention:
            raise UserError(f"{where(name)}: is about the rows of `retention`, and there are none; set retention too")
    if recipe.metric_for_best_model.removeprefix("eval_").startswith(OF_RETENTION) and not recipe.retention:
        raise UserError(
            f"{where('metric_for_best_model')}: {recipe.metric_for_best_model} is measured on `retention`; set that too"
        )
    if recipe.retention and recipe.model_config:
        raise UserError(
            f"{where('retention')}: a model from scratch (`model_config`) has nothing to forget; leave it out"
        )
    for name in ("retention", "eval_metrics"):
        if getattr(recipe, name) and not evaluated:
            raise UserError(
                f"{where(name)}: is measured with the evaluation, and there is none; set eval_dataset or eval_fraction"
            )
    if recipe.replay_fraction and not recipe.eval_fraction:
        raise UserError(
            f"{where('eval_fraction')}: expected a share above 0 of `retention` to measure, as replay_fraction trains on "
            "the rest, got 0"
        )
    chosen = recipe.load_best_model_at_end or recipe.early_stopping_patience is not None
    if recipe.max_forgetting is not None and not chosen:
        raise UserError(
            f"{where('max_forgetting')}: nothing is chosen by it; set load_best_model_at_end or early_stopping_patience"
        )
    if len(set(recipe.eval_metrics)) < len(recipe.eval_metrics):
        raise UserError(f"{where('eval_metrics')}: expected different metrics, got {', '.join(recipe.eval_metrics)}")
    if recipe.eval_metrics and recipe.method in ("prompt", "prefix"):
        raise UserError(
            f"{where('eval_metrics')}: responses with method: {recipe.method} are not offered; leave it out, the losses are "
            "measured all the same"
        )
