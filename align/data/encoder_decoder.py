"""Prompts and completions to the two sequences of an encoder-decoder: one that its encoder reads, one that its decoder writes.

They are two texts, each tokenized alone, with the special tokens that the tokenizer gives a source and a target: T5's EOS,
BART's <s> and </s>, the language codes of mBART. A target whose tokenizer adds no EOS gets one. Messages are rendered by the
chat template, which writes the special tokens of the source; without a template they are read as plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.data.dialogues import DialogueText
from align.data.encode import check_plain, example_texts, prompt_text
from align.data.reasoning import without_reasoning
from align.data.rows import BadRows, Demonstration, Tools, Turns, as_response, render_text, tools_of
from align.data.tokenize import Report, bad_row_report, check_length, id_dataset
from align.errors import BadRow

BATCH = 1000  # rows per call of the tokenizer
NO_PROMPT = "no prompt for the encoder to read; plain text trains an encoder-decoder in the mlm stage (span corruption or text infilling)"


def source_ids(tokenizer: PreTrainedTokenizerBase, prompt: Turns, tools: Tools = None) -> list[int]:
    """Ids that the encoder reads for a prompt.

    Raises:
        BadRow: the chat template rejects the messages, or plain text would lose a part of them.
    """
    plain = _as_read(tokenizer, prompt, tools)
    return _source_ids(tokenizer, [prompt_text(tokenizer, plain, tools)], [isinstance(plain, str)])[0]


def example_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Turns, response: Turns, tools: Tools = None
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, for the encoder, and of its response with its end, for the decoder.

    Raises:
        BadRow: as `source_ids`, or the template ignores a part of the messages.
    """
    ((source, target),) = _pair_ids(tokenizer, [_pair_text(tokenizer, prompt, response, tools)])
    return source, target


def tokenize_pairs(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_bad_row: str = "error",
    train_on_reasoning: bool = True,
    kept: list[Demonstration] | None = None,
) -> tuple[Dataset, Report]:
    """`input_ids` of the encoder and `labels` of the decoder of each row, and the bad rows by reason.

    Every assistant turn that is trained is an example: the turns before it are its source.

    Args:
        max_length: most tokens of a source, and of a target.
        kept: if given, is extended by the rows in the data set, in its order.

    Raises:
        UserError: there are bad rows and `on_bad_row` is "error"; no row is left.
    """
    bad = BadRows()

    def texts(row: Demonstration) -> list[tuple[DialogueText, bool]]:
        row = row if train_on_reasoning else without_reasoning(tokenizer, row)
        if not row.prompt:
            raise BadRow(NO_PROMPT)
        pairs = [(row.prompt[:place], [row.prompt[place]]) for place in row.trained if not isinstance(row.prompt, str)]
        return [
            _pair_text(tokenizer, prompt, response, tools_of(row))
            for prompt, response in [*pairs, (row.prompt, row.completion)]
        ]

    def records() -> Iterator[tuple[list[int], list[int]]]:
        for row, examples in _encoded(tokenizer, rows, bad, texts):
            with bad.catch(row.where):
                for source, target in examples:
                    check_length(len(source), max_length, "max_length", tokenizer)
                    check_length(len(target), max_length, "max_length", tokenizer)
                if kept is not None:
                    kept.extend([row] * len(examples))
                yield from examples

    dataset = id_dataset(("input_ids", "labels"), records())
    return dataset, bad_row_report(bad, on_bad_row, len(rows), len(dataset))


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Demonstration],
    bad: BadRows,
    texts_of: Callable[[Demonstration], list[tuple[DialogueText, bool]]],
) -> Iterator[tuple[Demonstration, list[tuple[list[int], list[int]]]]]:
    """Each row with (source, target) of its texts."""
    for start in range(0, len(rows), BATCH):
        rendered: list[tuple[Demonstration, list[tuple[DialogueText, bool]]]] = []
        for row in rows[start : start + BATCH]:
            with bad.catch(row.where):
                texts = texts_of(row)
                if not all(text.response.strip() for text, _ in texts):
                    raise BadRow("empty response")
                rendered.append((row, texts))
        ids = iter(_pair_ids(tokenizer, [text for _, texts in rendered for text in texts]))
        for row, texts in rendered:
            yield row, [next(ids) for _ in texts]


def _as_read(tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Tools) -> Turns:
    """Turns as the tokenizer can read them: messages only if it has a chat template."""
    if isinstance(turns, str) or tokenizer.chat_template:
        return turns
    check_plain(turns, "", tools)
    return render_text(turns)


def _pair_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Turns, response: Turns, tools: Tools
) -> tuple[DialogueText, bool]:
    """Prompt and response as text, and whether they are plain text."""
    prompt = _as_read(tokenizer, prompt, tools)
    if isinstance(prompt, str):
        response = _as_read(tokenizer, response, None)
    else:
        response = as_response(prompt, response) if isinstance(response, str) else response
    (text,) = example_texts(tokenizer, prompt, response, tools)
    return text, isinstance(prompt, str)


def _pair_ids(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[DialogueText, bool]]
) -> list[tuple[list[int], list[int]]]:
    """(source, target) of each pair."""
    plain = [is_plain for _, is_plain in pairs]
    sources = _source_ids(tokenizer, [text.prompt for text, _ in pairs], plain)
    targets = _by_kind(
        [text.response for text, _ in pairs],
        plain,
        lambda texts, special: tokenizer(text_target=texts, add_special_tokens=special, verbose=False)["input_ids"],
    )
    ended = [ids if text.end in ids else [*ids, text.end] for (text, _), ids in zip(pairs, targets, strict=True)]
    return list(zip(sources, ended, strict=True))


def _source_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
    found = _by_kind(
        texts, plain, lambda some, special: tokenizer(some, add_special_tokens=special, verbose=False)["input_ids"]
    )
    doubled = [tokenizer.bos_token_id] * 2  # the tokenizer's, and that of a text which begins with BOS itself
    return [ids[1:] if ids[:2] == doubled else ids for ids in found]


def _by_kind(
    texts: Sequence[str], plain: Sequence[bool], ids_of: Callable[[list[str], bool], list[list[int]]]
) -> list[list[int]]:
    """Ids of texts; those that are plain get special tokens, and a chat template has written those of the others."""
    found = {
        kind: iter(ids_of(some, kind) if (some := [t for t, p in zip(texts, plain, strict=True) if p == kind]) else [])
        for kind in (True, False)
    }
    return [next(found[kind]) for kind in plain]
