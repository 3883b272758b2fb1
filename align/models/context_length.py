"""The positions and the vocabulary that a model has, and whether rows, or prompts with their responses, fit them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from align.compat.transformers import COUNT_FROM_PADDING
from align.errors import UserError


def max_positions(config: PretrainedConfig) -> int | None:
    """The maximum number of tokens that the model reads; None if its configuration sets no limit."""
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if positions and text.model_type in COUNT_FROM_PADDING:
        return positions - int(text.pad_token_id) - 1
    return positions or None


def check_rows_fit(ids: Iterable[Sequence[int]], config: PretrainedConfig) -> None:
    """Check that the model has a position and an embedding for every token of the rows.

    Raises:
        UserError: a row is longer than the model reads, or has a token that it does not know.
    """
    sizes = [(len(row), max(row, default=0)) for row in ids]
    limit, longest = max_positions(config), max(length for length, _ in sizes)
    check_vocabulary((largest for _, largest in sizes), config)
    if limit is not None and longest > limit:
        raise UserError(
            f"max_length: the longest row has {longest} tokens, and the model reads at most {limit}; "
            f"set max_length: {limit}, and on_bad_row: skip to leave longer rows out."
        )


def check_vocabulary(ids: Iterable[int | None], config: PretrainedConfig) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UserError: it has not.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    largest = max((each for each in ids if each is not None), default=0)
    if size is not None and largest >= size:
        raise UserError(
            f"{config.name_or_path}: the tokenizer gives token {largest}, and the model knows those below {size}, its "
            "vocab_size; the tokenizer is that of another model, or a token was added to it. Copy the model's own."
        )


def check_responses_fit(
    prompts: Sequence[Sequence[int]],
    response_length: int,
    config: PretrainedConfig,
    remedy: str = "set max_prompt_length: {room} with on_bad_row: skip to leave long prompts out",
) -> None:
    """Check that the model has a position for every token of the longest prompt and its response.

    Args:
        prompts: token ids.
        remedy: what else to do than to lower response_length; `{room}` is the longest prompt that would fit.

    Raises:
        UserError: it has not.
    """
    limit, longest = max_positions(config), max(map(len, prompts))
    check_vocabulary((max(ids, default=0) for ids in prompts), config)
    if limit is not None and longest + response_length > limit:
        room = limit - response_length
        raise UserError(
            f"response_length: the longest prompt has {longest} tokens, which leaves {max(0, limit - longest)} "
            f"of the {limit} that the model reads, got {response_length}; lower it"
            + (f", or {remedy.format(room=room)}." if room > 0 else ".")
        )
