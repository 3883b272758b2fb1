"""The reasoning of a response, all up to the last `</think>`, the model's own mark or gpt-oss's final channel, and the answer that
follows: what rewards and metrics read.

By default they read the answer alone (`score_reasoning`). A response that begins to think and does not end it has no answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from align.data.end_tokens import without_end
from align.data.rows import Demonstration, Message, Turns, render_text
from align.data.thought_marks import CHANNEL, THINK, ThoughtMarks, opened_by, thought_marks
from align.errors import BadRow

KEYS = ("reasoning_content", "thinking", "reasoning")  # of messages
MESSAGE = "<|message|>"
FINAL = f"{CHANNEL}final{MESSAGE}"  # gpt-oss's: it thinks, and calls tools, in the channels before
ATTRIBUTE = "scores_reasoning"  # of the tokenizer, which every place that encodes or decodes responses has


def set_scores_reasoning(tokenizer: PreTrainedTokenizerBase, scores: bool) -> None:
    """Set whether rewards and metrics read the reasoning of responses too."""
    setattr(tokenizer, ATTRIBUTE, scores)


def scores_reasoning(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The value of `set_scores_reasoning`; False by default."""
    return bool(getattr(tokenizer, ATTRIBUTE, False))


def split_text(text: str, marks: Sequence[ThoughtMarks] = (THINK,)) -> tuple[str, str]:
    """Reasoning, with its marks and the white space after it, and answer; a text without reasoning is an answer.

    Args:
        marks: of the model whose text it is.
    """
    closing = [FINAL] if text.startswith(CHANNEL) else [each.closes for each in marks]
    size = max(text.rfind(mark) + len(mark) if mark in text else 0 for mark in closing)
    if not size and text.lstrip().startswith((*(each.opens for each in marks), CHANNEL)):
        return text, ""
    size += len(text[size:]) - len(text[size:].lstrip()) if size else 0
    return text[:size], text[size:]


def scored_turns(tokenizer: PreTrainedTokenizerBase, response: Turns) -> Turns:
    """A response of the data as rewards and metrics read it."""
    return response if scores_reasoning(tokenizer) else answer_of(tokenizer, response)


def answer_of(tokenizer: PreTrainedTokenizerBase, response: Turns) -> Turns:
    """A response of the data without its reasoning."""
    if isinstance(response, str):
        return split_text(response, thought_marks(tokenizer))[1]
    return [_answer_of_turn(tokenizer, turn) for turn in response]


def without_reasoning(tokenizer: PreTrainedTokenizerBase, row: Demonstration) -> Demonstration:
    """The row without the reasoning of any assistant turn.

    Raises:
        BadRow: its completion is reasoning alone.
    """
    completion, prompt = answer_of(tokenizer, row.completion), row.prompt
    calls = not isinstance(completion, str) and any(turn.get("tool_calls") for turn in completion)
    if not render_text(completion).strip() and not calls:
        raise BadRow("no answer after the reasoning; `train_on_reasoning: true` would train the reasoning")
    if not isinstance(prompt, str):
        prompt = [_answer_of_turn(tokenizer, turn) if turn["role"] == "assistant" else turn for turn in prompt]
    return dataclasses.replace(row, prompt=prompt, completion=completion)


def _answer_of_turn(tokenizer: PreTrainedTokenizerBase, turn: Message) -> Message:
    kept = {key: value for key, value in turn.items() if key not in KEYS}
    return kept | {"content": split_text(turn["content"], thought_marks(tokenizer))[1]}


def split_sampled(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> tuple[str, str]:
    """Reasoning and answer of a sampled response; no reasoning where it is scored with the answer.

    Args:
        text: of the response, without special tokens, which the marks of reasoning may be.
        prompt_ids: of the prompt, which may have opened the reasoning.
    """
    ids = without_end(tokenizer, response_ids)
    if scores_reasoning(tokenizer):
        return "", with_marks(tokenizer, text, ids)
    vocabulary = tokenizer.get_added_vocab()
    if CHANNEL in vocabulary and ids[:1] == [vocabulary[CHANNEL]]:
        marked = [end for end, id in enumerate(ids, 1) if id == vocabulary.get(MESSAGE)]
        final = next((end for end in reversed(marked) if str(tokenizer.decode(ids[:end])).endswith(FINAL)), len(ids))
        answer = str(tokenizer.decode(ids[final:], skip_special_tokens=True))
        return "" if [final] == marked[:1] else text.removesuffix(answer) or CHANNEL, answer
    marks = thought_marks(tokenizer)
    closed = max(_closed_at(tokenizer, ids, each.closes) for each in marks)
    if closed:
        answer = str(tokenizer.decode(ids[closed:], skip_special_tokens=True)).lstrip()
        return text.removesuffix(answer) or THINK.closes, answer
    reasoning, answer = split_text(text, marks)
    opened = opened_by(tokenizer, str(tokenizer.decode(list(prompt_ids[-64:])))) is not None
    begun = str(tokenizer.decode(ids[:16])).lstrip().startswith(tuple(each.opens for each in marks))
    unclosed = not reasoning and (opened or begun)
    return (text or THINK.opens, "") if unclosed else (reasoning, answer)


def _closed_at(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], closes: str) -> int:
    """Where a thought's last end by a token is behind, which decoding may leave out of the text; 0 without one."""
    last = {id for token, id in tokenizer.get_added_vocab().items() if closes.endswith(token)}
    places = (end for end in range(len(ids), 0, -1) if ids[end - 1] in last)
    return next((end for end in places if str(tokenizer.decode(list(ids[:end]))).rstrip().endswith(closes)), 0)


def with_marks(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> str:
    """The text of a response, with marks of reasoning that it lacks because they are special tokens."""
    texts = "\n".join(mark for each in thought_marks(tokenizer) for mark in (each.opens, each.closes))
    marks = {id: token for token, id in tokenizer.get_added_vocab().items() if token in texts}
    if all(mark in text for token, mark in marks.items() if token in ids):
        return text
    added = tokenizer.added_tokens_decoder
    return str(
        tokenizer.decode([token for token in ids if token in marks or token not in added or not added[token].special])
    )
