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


def tokenize_passages(
    rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, length: int, whole_words: bool = False
) -> Dataset:
    """`input_ids`, `row` (the piece's number) and `weight` (1) of pieces of the texts, in order.

    With `whole_words` also `words`, the number of each token's word in its text; -1 for special tokens.

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
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
            for index, ids in enumerate(encoded["input_ids"]):
                words = word_numbers(encoded, index) if whole_words else []
                for part in even_parts(len(ids), -(-len(ids) // room)):
                    record = {"input_ids": before + ids[part] + after, "row": number, "weight": 1}
                    if whole_words:
                        record["words"] = [-1] * len(before) + words[part] + [-1] * len(after)
                    yield record
                    number += 1

    features = {"input_ids": List(Value("int32")), "row": Value("int64"), "weight": Value("int32")}
    return in_memory(records(), features | ({"words": List(Value("int32"))} if whole_words else {}))


def even_parts(length: int, count: int) -> list[slice]:
    """Slices of a sequence, of equal length to within one."""
    return [slice(length * place // count, length * (place + 1) // count) for place in range(count)]


def word_numbers(encoded: Any, index: int) -> list[int]:
    """For each token of a text of a batch, the number of its word; -1 for one of no word."""
    return [-1 if word is None else word for word in encoded.word_ids(index)]


def check_words(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Check that the tokenizer says which tokens are of one word.

    Raises:
        UserError: it is one in Python, or takes a whole text for a word, as SentencePiece without pre-tokenization does.
    """
    if not tokenizer.is_fast or len({*tokenizer("one two three", add_special_tokens=False).word_ids()}) < 3:
        raise UserError(
            f"whole_word_mask: the tokenizer of {path} ({type(tokenizer).__name__}) does not say which tokens are of one word; "
            "leave it out, or name a model with a fast tokenizer that splits a text into words."
        )


def in_memory(records: Iterator[dict[str, Any]], features: dict[str, Any]) -> Dataset:
    """A data set in memory, built in parts, since Python's integers take several times the memory of Arrow's."""
    kinds = Features(features)
    parts = [Dataset.from_dict({name: [] for name in features}, features=kinds)]
    while part := list(islice(records, BATCH)):
        parts.append(Dataset.from_list(part, features=kinds))
    return concatenate_datasets(parts)
