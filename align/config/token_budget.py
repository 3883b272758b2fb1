"""The key `max_tokens_per_device` of PPO's stage, and its rules.

Functions take the recipe of PPO, whose file imports this one.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from align.config.keys import TOKENS, Where, key
from align.errors import UserError


def max_tokens_per_device() -> Any:
    """The key `max_tokens_per_device` of PPO's stage."""
    return key(
        None,
        "Instead of per_device_train_batch_size: maximum tokens, padding included, in one forward-backward pass per device. "
        "Responses of similar length share a pass, as many as fit; the forward passes of policy, reference and value model "
        "over a rollout have it too. Does not change the result.",
        TOKENS,
    )


def check_token_budget(recipe: Any, where: Where) -> None:
    """The rules between `max_tokens_per_device` and other keys.

    Raises:
        UserError: names the first broken rule.
    """
    longest, most = recipe.max_prompt_length + recipe.response_length, recipe.max_tokens_per_device
    if most is None:
        return
    if most < longest:
        raise UserError(
            f"{where('max_tokens_per_device')}: expected at least max_prompt_length + response_length ({longest}), the longest "
            f"sequence, got {most}"
        )
    default = next(each.default for each in fields(recipe) if each.name == "per_device_train_batch_size")
    if recipe.per_device_train_batch_size != default:
        raise UserError(
            f"{where('per_device_train_batch_size')}: with max_tokens_per_device a pass has as many sequences as fit, got "
            f"{recipe.per_device_train_batch_size}; leave one of them out."
        )
