"""Typed rows to data sets of token ids.

Labels are made from lengths, never by comparing ids, so padding may share its id with EOS. A row that is too long is a
bad row; nothing is truncated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from align.data.dialogues import DialogueText
from align.data.encode import (
    ending_once,
    example_texts,
    labels_of_turns,
    prompt_text,
)
from align.data.encode_rows import BATCH, encoded, encoded_pairs
from align.data.reasoning import without_reasoning
from align.data.rows import BadRows, Demonstration, Preference, Prompt, is_tie, tools_of
from align.errors import BadRow, UserError

NO_MARGIN = "no `margin` (nor `strength`), which other rows have; write 0 for none (as strength 1)"
IGNORE_INDEX = -100  # label of a token that the loss ignores
Report = dict[str, dict[str, Any]]


def tokenize_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_bad_row: str = "error",
    completion_only_loss: bool = True,
    packing: bool = False,
    train_on_reasoning: bool = True,
    kept: list[Demonstration] | None = None,
) -> tuple[Dataset, Report]:
    """`input_ids` and `labels` (-100 where the loss ignores a token) of each row, and the bad rows by reason.

    Args:
        max_length: most tokens of a row; longer ones are bad rows.
        on_bad_row: "error" or "skip".
        completion_only_loss: whether the loss ignores prompts.
        packing: whether the rows will be packed; plain text may then exceed `max_length`, since packing cuts it.
        train_on_reasoning: whether assistant turns keep their reasoning.
        kept: if given, is extended by the rows in the data set, in its order.

    Raises:
        UserError: there are bad rows and `on_bad_row` is "error"; no row is left; rows are messages and the tokenizer
            has no chat template.
    """
    bad = BadRows()

    def texts(row: Demonstration) -> list[DialogueText]:
        row = row if train_on_reasoning else without_reasoning(tokenizer, row)
        trained = row.trained if completion_only_loss else ()  # without it, the last text trains all turns
        return example_texts(tokenizer, row.prompt, row.completion, tools_of(row), trained)

    def records() -> Iterator[tuple[list[int], list[int]]]:
        for row, examples in encoded(tokenizer, rows, bad, texts):
            made = []
            with bad.catch(row.where):
                for text, _, before, response in examples:
                    ids = before + response
                    if row.prompt or not packing:
                        check_length(len(ids), max_length, "max_length", tokenizer)
                    labels = ids
                    if completion_only_loss:
                        labels = [IGNORE_INDEX] * len(before)
                        if text.turns:
                            labels = labels_of_turns(tokenizer, text, before, IGNORE_INDEX)
                        labels = labels + response
                    made.append((ids, labels))
            if len(made) == len(examples):
                if kept is not None:
                    kept.extend([row] * len(made))
                yield from made

    dataset = id_dataset(("input_ids", "labels"), records())
    return dataset, bad_row_report(bad, on_bad_row, len(rows), len(dataset))


def tokenize_preferences(
    rows: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_bad_row: str = "error",
    is_encoder: bool = False,
    ends_once: bool = False,
    kept: list[Preference] | None = None,
) -> tuple[Dataset, Report]:
    """`chosen_ids` and `rejected_ids` (prompt and response each) of each row, and the bad rows by reason.

    Where rows have a `margin`, so has the data set; all rows but ties must have one (or a `strength`, of which it follows), or none.
    Where one is a tie, the data set has `tie`: 1 for a tie, else 0.

    Args:
        max_length: most tokens of prompt and response; rows with a longer one are bad rows.
        is_encoder: join prompt and response in the tokenizer's format for pairs, which encoders are trained on.
        ends_once: whether the model reads the score at the one end-of-text token of a row, as encoder-decoders do.
        kept: gets the row of each pair of the data set.

    Raises:
        UserError: there are bad rows and `on_bad_row` is "error"; no row is left; rows are messages and the tokenizer
            has no chat template.
    """
    bad = BadRows()
    graded = any(map(_is_graded, rows))
    has_margin = any(row.extra.get("margin") is not None for row in rows)
    has_tie = any(map(is_tie, rows))

    def records() -> Iterator[list[Any]]:
        for row, sequences in encoded_pairs(tokenizer, rows, bad, is_encoder):
            with bad.catch(row.where):
                if ends_once:
                    sequences = [ending_once(tokenizer, ids) for ids in sequences]
                check_length(max(map(len, sequences)), max_length, "max_length", tokenizer)
                if sequences[0] == sequences[1]:
                    raise BadRow("`chosen` and `rejected` have the same tokens")
                if graded and _lacks_margin(row):
                    raise BadRow(NO_MARGIN)
                margin = [float(row.extra.get("margin") or 0.0)] if has_margin else []
                if kept is not None:
                    kept.append(row)
                yield [*sequences, *margin, *([float(is_tie(row))] if has_tie else [])]

    more = [name for name, has in (("margin", has_margin), ("tie", has_tie)) if has]
    dataset = id_dataset(("chosen_ids", "rejected_ids", *more), records())
    return dataset, bad_row_report(bad, on_bad_row, len(rows), len(dataset))


def check_margins(parts: Sequence[Sequence[Preference]], on_bad_row: str) -> None:
    """Check that all rows of a part, training or held-out ones, have a `margin` or are ties, or none has one or a `strength`; one error counts
    those of all parts.

    Raises:
        UserError: some have none, and `on_bad_row` is "error".
    """
    bad = BadRows()
    if any(any(map(_is_graded, rows)) and any(map(_lacks_margin, rows)) for rows in parts):
        bad.by_reason[NO_MARGIN] = [row.where for rows in parts for row in rows if _lacks_margin(row)]
    bad.raise_or_report(on_bad_row)


def _is_graded(row: Preference) -> bool:
    """Whether the row says by how much a response is better, or by its `strength` that none is."""
    return any(row.extra.get(name) is not None for name in ("margin", "strength"))


def _lacks_margin(row: Preference) -> bool:
    return row.extra.get("margin") is None and not is_tie(row)


def tokenize_prompts(
    rows: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, on_bad_row: str
) -> tuple[list[tuple[Prompt, list[int]]], Report]:
    """Each prompt with its token ids, and the bad rows by reason.

    Raises:
        UserError: there are bad rows and `on_bad_row` is "error"; no row is left; rows are messages and the tokenizer
            has no chat template.
    """
    bad = BadRows()
    prompts: list[tuple[Prompt, list[int]]] = []

    def texts(row: Prompt) -> list[DialogueText]:
        text = prompt_text(tokenizer, row.prompt, tools_of(row))
        ends_in_space = isinstance(row.prompt, str) and text[-1:].isspace()
        return [
            DialogueText(text, "the" if ends_in_space else "")
        ]  # a word shows whether the space would be joined to it

    for row, [(_, ids, *_)] in encoded(tokenizer, rows, bad, texts):
        with bad.catch(row.where):
            if row.prompt and not ids:
                raise BadRow("the tokenizer leaves nothing of the prompt")
            check_length(len(ids), max_prompt_length, "max_prompt_length", tokenizer)
            prompts.append((row, ids))
    return prompts, bad_row_report(bad, on_bad_row, len(rows), len(prompts))


def id_dataset(names: tuple[str, ...], records: Iterator[Sequence[Any]]) -> Dataset:
    """A data set in memory, built in chunks, because lists of Python integers take many times the memory of Arrow's."""
    features = Features(
        {name: Value("float32") if name in ("margin", "tie") else List(Value("int32")) for name in names}
    )
    parts = [Dataset.from_dict({name: [] for name in names}, features=features)]
    while part := list(islice(records, BATCH)):
        columns = dict(zip(names, zip(*part, strict=True), strict=True))
        parts.append(Dataset.from_dict(columns, features=features))
    return concatenate_datasets(parts)


def check_length(size: int, limit: int, key: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the number of tokens of a sequence.

    Raises:
        BadRow: it is above `limit`, the value of `key`, or above what the tokenizer says that its model reads.
    """
    if size > limit:
        raise BadRow(f"longer than {limit} tokens (`{key}`)")
    if size > tokenizer.model_max_length:
        raise BadRow(f"longer than {tokenizer.model_max_length} tokens (the tokenizer's model_max_length)")


def bad_row_report(bad: BadRows, on_bad_row: str, before: int, after: int) -> Report:
    """The bad rows by reason.

    Raises:
        UserError: there are some and `on_bad_row` is "error"; none of the rows `before` is left `after`.
    """
    report = bad.raise_or_report(on_bad_row)
    if before and not after:
        raise UserError(
            f"none of {before} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    return report
