"""Whether rows, and prompts with their responses, fit the positions of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from align.config.ppo import PPORecipe
from align.errors import UserError


def check_responses_fit(prompts: Sequence[Sequence[int]], recipe: PPORecipe, config: PretrainedConfig) -> None:
    """See that the policy has a position for every token of the longest prompt and its response.

    Raises:
        UserError: it has not.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if limit is not None and longest + recipe.response_length > limit:
        raise UserError(
            f"response_length: the longest prompt has {longest} tokens, and with {recipe.response_length} more it is over "
            f"the {limit} that the policy reads; lower response_length, or set max_prompt_length: "
            f"{max(limit - recipe.response_length, 1)} with on_bad_row: skip to leave long prompts out."
        )


def max_positions(config: PretrainedConfig) -> int:
    """Most tokens that the model reads."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9)


def check_rows_fit(ids: Iterable[Sequence[int]], config: PretrainedConfig) -> None:
    """See that the model has a position for every token of the rows.

    Raises:
        UserError: a row is longer than the model can read.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if limit is not None and longest > limit:
        raise UserError(
            f"max_length: the longest row has {longest} tokens, and the model reads at most {limit}; "
            f"set max_length: {limit}, and on_bad_row: skip to leave longer rows out."
        )
