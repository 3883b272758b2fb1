"""The key of sequence parallelism, and its rules with other keys."""

from __future__ import annotations

from typing import Any

from align.config.base import TrainerRecipe
from align.config.keys import AT_LEAST_1, Where, key
from align.errors import UserError


def sequence_parallel_size() -> Any:
    """The key of the stages that have it."""
    return key(
        1,
        "Processes that share rows, each with a part of every sequence (Ulysses, arXiv 2309.14509): activations are divided by this "
        "number, which must divide the processes and the attention heads.",
        AT_LEAST_1,
    )


def check_sequence_parallel_rules(recipe: TrainerRecipe, where: Where) -> None:
    """The rules for `sequence_parallel_size`.

    Raises:
        UserError: a key has a value that it does not go with.
    """
    size: int = getattr(recipe, "sequence_parallel_size", 1)
    if size == 1:
        return
    with_it = f"with sequence_parallel_size: {size}"
    if recipe.attn_implementation not in (None, "sdpa"):
        raise UserError(
            f"{where('attn_implementation')}: expected sdpa {with_it}, got {recipe.attn_implementation}; leave it out"
        )
    if recipe.method in ("prompt", "prefix"):
        raise UserError(
            f"{where('method')}: {recipe.method} puts virtual tokens before each sequence, which cannot be split {with_it}; "
            "use lora, or leave sequence_parallel_size out"
        )
    if getattr(recipe, "neftune_noise_alpha", None) is not None:
        raise UserError(
            f"{where('neftune_noise_alpha')}: its noise depends on the length of a whole row, which no process has {with_it}; "
            "leave one of them out"
        )
