"""The key of sequence parallelism, and its rules with other keys."""

from __future__ import annotations

from typing import Any

from align.config.convert import shown
from align.config.keys import AT_LEAST_1, Where, key
from align.errors import UserError

OF_PPO: dict[str, list[Any]] = {
    "objective": ["ppo"],
    "ptx_dataset": [[]],
    "max_tokens_per_device": [None],
    "value_method": ["full", "lora"],
}  # what goes with it


def sequence_parallel_size() -> Any:
    """The key of the stages that have it."""
    return key(
        1,
        "Processes that share rows, each with a part of every sequence (Ulysses, arXiv 2309.14509): activations are divided by this "
        "number, which must divide the processes and the attention heads.",
        AT_LEAST_1,
    )


def check_sequence_parallel_rules(recipe: Any, where: Where) -> None:
    """The rules for `sequence_parallel_size`.

    Raises:
        UserError: a key has a value that it does not go with.
    """
    size: int = recipe.sequence_parallel_size
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
    for name, values in OF_PPO.items():
        if (got := getattr(recipe, name, values[0])) not in values:
            goes = f"expected {' or '.join(values)}" if values[0] else "expected to be left out"
            raise UserError(f"{where(name)}: {goes} {with_it}, got {shown(got)}; leave one of them out")
