"""From plain and labeled texts to data sets of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.data.encode import encode_pair, ending_once
from align.data.rows import BadRows, Labelled, Passage
from align.encoders.labels import MULTI, SINGLE, LabelSet
from align.errors import BadRow, UserError
from align.models.context_length import max_positions

BATCH = 1000  # rows tokenized together


def tokenize_labelled(
    rows: Sequence[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    label_set: LabelSet,
    *,
    max_length: int,
    on_bad_row: str,
    is_encoder: bool,
    ends_once: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """`input_ids`, `labels` (encoded) and `weight` (1) of each row, and the bad rows by reason.

    A pair has the tokenizer's format for pairs for an encoder. For a decoder it has the format of a prompt and its
    response in the reward stage, so that PPO can use the classifier.

    Args:
        ends_once: whether the model reads the label at the one end-of-text token of a row, as encoder-decoders do.

    Raises:
        UserError: there are bad rows and `on_bad_row` is "error"; no row is left.
    """
    bad = BadRows()
    limit = min(max_length, tokenizer.model_max_length)
    name = "`max_length`" if limit == max_length else "the tokenizer's model_max_length"

    def records() -> Iterator[dict[str, Any]]:
        for row in rows:
            with bad.catch(row.where):
                if row.text_pair is None:
                    ids = tokenizer(row.text, verbose=False)["input_ids"]
                else:
                    ids = encode_pair(tokenizer, row.text, row.text_pair, is_encoder)
                ids = ending_once(tokenizer, ids) if ends_once else ids
                if len(ids) > limit:
                    raise BadRow(f"longer than {limit} tokens ({name})")
                yield {"input_ids": ids, "labels": label_set.encode(row), "weight": 1}

    target = Value("int64" if label_set.problem_type == SINGLE else "float32")
    features = {
        "input_ids": List(Value("int32")),
        "labels": List(target) if label_set.problem_type == MULTI else target,
        "weight": Value("int32"),
    }
    dataset = in_memory(records(), features)
    report = bad.raise_or_report(on_bad_row)
    if not dataset:
        raise UserError(
            f"none of {len(rows)} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    return dataset, report


def piece_length(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, max_length: int) -> int:
    """Maximum tokens of a piece of text, special tokens included, within the limits of recipe, model and tokenizer."""
    return int(min(max_length, max_positions(config) or max_length, tokenizer.model_max_length))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before a text and after it."""
    full, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    before = next(start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return full[:before], full[before + len(bare) :]


def tokenize_passages(rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """`input_ids`, `row` (the piece's number) and `weight` (1) of pieces of the texts, in order.

    A text of more than `length` tokens is split into as few pieces as possible, of equal length to within a token, each
    with its own special tokens. Every token of the text is in exactly one piece.

    Raises:
        UserError: the special tokens leave no room for text.
    """
    before, after = special_tokens(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"max_length: {length} tokens leave no room for text beside the tokenizer's special tokens; raise it."
        )

    def records() -> Iterator[dict[str, Any]]:
        number = 0
        for start in range(0, len(rows), BATCH):
            texts = [row.text for row in rows[start : start + BATCH]]
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                count = -(-len(ids) // room)
                for place in range(count):
                    piece = ids[len(ids) * place // count : len(ids) * (place + 1) // count]
                    yield {"input_ids": before + piece + after, "row": number, "weight": 1}
                    number += 1

    return in_memory(records(), {"input_ids": List(Value("int32")), "row": Value("int64"), "weight": Value("int32")})


def in_memory(records: Iterator[dict[str, Any]], features: dict[str, Any]) -> Dataset:
    """A data set in memory, built in parts, since Python's integers take several times the memory of Arrow's."""
    kinds = Features(features)
    parts = [Dataset.from_dict({name: [] for name in features}, features=kinds)]
    while part := list(islice(records, BATCH)):
        parts.append(Dataset.from_list(part, features=kinds))
    return concatenate_datasets(parts)
