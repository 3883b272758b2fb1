"""Reward functions and graders that a recipe names."""

from __future__ import annotations

from align.config.functions import resolve_function
from align.engine.rank_errors import give_up
from reward_models.functions import FunctionReward


def user_function(name: str, key: str, timeout: float) -> FunctionReward:
    """The function `module:function` that the recipe's `key` names, as a source of scores.

    Args:
        timeout: seconds that a call may take.

    Raises:
        UserError: there is no such function.
    """
    return FunctionReward(name, resolve_function(name, key), timeout, give_up)
