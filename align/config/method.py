"""The rules for `method`, what of a model is trained, and the keys that go with it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from align.config.base import StageRecipe
from align.config.deepspeed_file import zero_stage_of
from align.config.keys import Where
from align.errors import UserError


def check_method(recipe: StageRecipe, supported: Sequence[str], where: Where) -> None:
    """Check `method` and the keys that go with it.

    Args:
        supported: the values of `method` that the recipe's stage takes.

    Raises:
        UserError: another method, or keys of another one.
    """
    virtual = recipe.method in ("prompt", "prefix")
    if recipe.method not in supported:
        reason = "cannot be merged, so later stages could not start from it" if virtual else "is not supported here"
        raise UserError(
            f"{where('method')}: expected one of {', '.join(supported)} in the {recipe.stage} stage, got "
            f"{recipe.method}, which {reason}"
        )
    partial = bool(recipe.freeze_layers) + (recipe.trainable_pattern is not None)
    if recipe.method == "freeze" and partial != 1:
        raise UserError(
            f"{where('method')}: freeze needs either freeze_layers or trainable_pattern, got "
            f"{'both' if partial else 'neither'}"
        )
    if recipe.method != "freeze" and partial:
        name = "freeze_layers" if recipe.freeze_layers else "trainable_pattern"
        raise UserError(f"{where(name)}: is for method: freeze, got method: {recipe.method}")
    if recipe.trainable_pattern is not None:
        try:
            re.compile(recipe.trainable_pattern)
        except re.error as error:
            raise UserError(f"{where('trainable_pattern')}: not a regular expression: {error}") from None
    if virtual and (getattr(recipe, "packing", False) or getattr(recipe, "padding_free", False)):
        raise UserError(
            f"{where('method')}: {recipe.method} prepends virtual tokens to each row, which does not work with packed "
            "rows"
        )
    if virtual and zero_stage_of(recipe.deepspeed) == 3:
        raise UserError(
            f"{where('method')}: {recipe.method} is not supported at ZeRO 3; use ZeRO 2, it trains few parameters"
        )
