"""The rules of the stages that sample responses and score them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.config.keys import Where
from align.errors import UserError


def check_scored_responses(recipe: Any, sources: Sequence[str], where: Where) -> None:
    """The rules for rewards with their weights, and for what ends a response.

    Args:
        sources: names of the rewards.

    Raises:
        UserError: names the first broken rule.
    """
    if not sources:
        raise UserError(f"{where('reward_model_path')}: expected a reward model, or `reward_funcs`, got neither")
    if recipe.reward_weights and len(recipe.reward_weights) != len(sources):
        raise UserError(
            f"{where('reward_weights')}: expected {len(sources)} weights, one each for {', '.join(sources)}, got "
            f"{len(recipe.reward_weights)}"
        )
    if "" in recipe.stop_strings:
        raise UserError(f"{where('stop_strings')}: expected text that ends a response, got an empty string")
    if recipe.missing_eos_penalty is not None and recipe.missing_eos_score is not None:
        raise UserError(
            f"{where('missing_eos_score')}: expected only one of missing_eos_penalty (subtracts) and missing_eos_score "
            "(replaces), got both"
        )
