"""Rows to the token ids of their texts, in batches; oddities in the rows are reported at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.dialogues import DialogueText
from align.data.encode import check_plain, example_texts, pair_ids
from align.data.findings import Findings
from align.data.reasoning import scored_turns
from align.data.rows import BadRows, Preference, Prompt, Turns, render_text, tools_of
from align.data.token_ids import text_ids, whole_ids
from align.errors import BadRow

BATCH = 1000  # rows per call of the tokenizer


def encoded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], bad: BadRows, texts_of: Callable[[Any], list[DialogueText]]
) -> Iterator[tuple[Any, list[tuple[DialogueText, list[int], list[int], list[int]]]]]:
    """Yield each row with its texts: (text, ids of the prompt alone, ids before the response, the response's ids)."""
    findings = Findings(tokenizer)
    for start in range(0, len(rows), BATCH):
        rendered: list[tuple[Any, list[DialogueText]]] = []
        for row in rows[start : start + BATCH]:
            with bad.catch(row.where):
                texts = texts_of(row)
                if not isinstance(row, Prompt) and not all(text.response.strip() for text in texts):  # only EOS
                    raise BadRow("empty response")
                rendered.append((row, texts))
        flat = [text for _, texts in rendered for text in texts]
        are_plain = [isinstance(row.prompt, str) for row, texts in rendered for _ in texts]
        own_ids = text_ids(tokenizer, [text.prompt for text in flat], are_plain)
        encoded = iter(zip(flat, own_ids, whole_ids(tokenizer, flat, are_plain, own_ids), strict=True))
        for row, texts in rendered:
            found = list(islice(encoded, len(texts)))
            findings.inspect(row, texts, [own for _, own, _ in found], [before for *_, (before, _) in found])
            yield row, [(text, own, *ids) for text, own, ids in found]
    findings.report(len(rows))


def encoded_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference], bad: BadRows, is_encoder: bool
) -> Iterator[tuple[Preference, list[list[int]]]]:
    """Yield (row, [ids of prompt + chosen, ids of prompt + rejected])."""
    if not is_encoder:

        def texts(row: Preference) -> list[DialogueText]:
            pair = [_scored(tokenizer, response) for response in (row.chosen, row.rejected)]
            return [text for each in pair for text in example_texts(tokenizer, row.prompt, each, tools_of(row))]

        for row, examples in encoded(tokenizer, rows, bad, texts):
            yield row, [before + response for *_, before, response in examples]
        return
    findings = Findings(tokenizer)
    for start in range(0, len(rows), BATCH):
        batch: list[tuple[Preference, list[Turns]]] = []
        for row in rows[start : start + BATCH]:
            with bad.catch(row.where):
                answers = [_scored(tokenizer, response) for response in (row.chosen, row.rejected)]
                for answer in answers:
                    check_plain(row.prompt, answer, tools_of(row))
                batch.append((row, answers))
                findings.inspect(row, [DialogueText("", render_text(answer)) for answer in answers], [], [])
        prompts = [render_text(row.prompt) for row, _ in batch]
        sides = [pair_ids(tokenizer, prompts, [render_text(pair[side]) for _, pair in batch]) for side in (0, 1)]
        yield from ((row, list(ids)) for (row, _), *ids in zip(batch, *sides, strict=True))
    findings.report(len(rows))


def _scored(tokenizer: PreTrainedTokenizerBase, response: Turns) -> Turns:
    answer = scored_turns(tokenizer, response)
    if not render_text(answer).strip():
        raise BadRow("no answer after the reasoning; `score_reasoning: true` would score the reasoning")
    return answer
