"""Plain texts and labelled ones to data sets of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.data.encode import encode_pair
from align.data.rows import BadRows, Labelled, Passage
from align.encoders.labels import MULTI, SINGLE, Labels
from align.errors import BadRow, UserError
from align.models.context_length import max_positions

BATCH = 1000  # rows tokenised together


def tokenize_labelled(
    rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, labels: Labels, recipe: ClassifyRecipe, encoder: bool
) -> tuple[Dataset, dict[str, Any]]:
    """`input_ids`, `labels` (encoded) and `weight` (1) of each row, and the bad rows by reason.

    A text has the ids that the tokenizer gives it. A pair has those that the tokenizer gives a pair for an encoder, and
    for a decoder those of a prompt and its response, as in the reward stage, so that PPO can use such a model.

    Raises:
        UserError: bad rows and `on_bad_row` is "error"; no row is left.
    """
    bad = BadRows()
    limit = min(recipe.max_length, tokenizer.model_max_length)
    name = "`max_length`" if limit == recipe.max_length else "the tokenizer's model_max_length"

    def records() -> Iterator[dict[str, Any]]:
        for row in rows:
            with bad.catch(row.where):
                if row.text_pair is None:
                    ids = tokenizer(row.text, verbose=False)["input_ids"]
                else:
                    ids = encode_pair(tokenizer, row.text, row.text_pair, encoder)
                if len(ids) > limit:
                    raise BadRow(f"longer than {limit} tokens ({name})")
                yield {"input_ids": ids, "labels": labels.encode(row), "weight": 1}

    one = Value("int64" if labels.problem_type == SINGLE else "float32")
    features = {
        "input_ids": List(Value("int32")),
        "labels": List(one) if labels.problem_type == MULTI else one,
        "weight": Value("int32"),
    }
    dataset = _dataset(records(), features)
    report = bad.raise_or_report(recipe.on_bad_row)
    if not dataset:
        raise UserError(
            f"none of {len(rows)} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    return dataset, report


def piece_length(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, recipe: MLMRecipe) -> int:
    """Most tokens of a piece of text, special tokens included: what the recipe says and the model reads."""
    return int(min(recipe.max_length, max_positions(config) or recipe.max_length, tokenizer.model_max_length))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before a text and after it."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    before = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[:before], whole[before + len(bare) :]


def tokenize_passages(rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """`input_ids`, `row` (its number) and `weight` (1) of pieces of the texts, in order.

    A text of more than `length` tokens is cut into as few pieces as will do, of the same length to within a token, each
    with special tokens of its own. Every token of the text is in one piece.

    Raises:
        UserError: there is no room for text beside the special tokens.
    """
    before, after = special_tokens(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"max_length: {length} tokens have no room for text beside the tokenizer's special tokens; raise it."
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

    return _dataset(records(), {"input_ids": List(Value("int32")), "row": Value("int64"), "weight": Value("int32")})


def _dataset(records: Iterator[dict[str, Any]], features: dict[str, Any]) -> Dataset:
    """A data set in memory, built in parts: Arrow integers are small, Python's are not."""
    kinds = Features(features)
    parts = [Dataset.from_dict({name: [] for name in features}, features=kinds)]
    while part := list(islice(records, BATCH)):
        parts.append(Dataset.from_list(part, features=kinds))
    return concatenate_datasets(parts)
