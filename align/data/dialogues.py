"""Messages to text by a chat template: each assistant turn as generation would render it.

Generation starts from the messages so far with a generation prompt; what the template writes for the next assistant turn
is the response. A template may render a turn otherwise once others follow: a thought that is dropped, an end that only a
complete dialogue has. A row whose turns all appear in one rendering is one text; otherwise it becomes one text per trained turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from align.data.end_tokens import end_texts, split_at_end
from align.data.rows import Message, Tools
from align.data.template_input import PROBE, as_template_reads, check_system, common_length, render
from align.data.thought_marks import THINK, marks_in, opened_by
from align.errors import BadRow


@dataclass(frozen=True, slots=True)
class DialogueText:
    """A prompt and its response as text.

    Attributes:
        end: id of the token that ends the response, which is not in the text.
        turns: (start, end) of the assistant turns in the prompt that are trained too.
    """

    prompt: str
    response: str
    end: int = -1
    turns: list[tuple[int, int]] = field(default_factory=list)


def dialogue_texts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], trained: Sequence[int], tools: Tools = None
) -> list[DialogueText]:
    """The last message as a response to the others: one text, or one more for each of `trained` where no rendering serves all.

    Args:
        trained: places of earlier assistant turns that are trained too.

    Raises:
        BadRow: the template rejects the messages, or ignores a part of them.
        UserError: the tokenizer has no chat template.
    """
    messages = as_template_reads(tokenizer, messages, tools)
    earlier = []
    for index in trained:
        prompt, response = _turn_text(tokenizer, messages[: index + 1], tools)
        earlier.append(DialogueText(prompt, response + _end_by_next(tokenizer, messages[: index + 2], tools, response)))
    last = DialogueText(*_turn_text(tokenizer, messages, tools))
    check_system(tokenizer, messages, tools, last.prompt)
    spans = [
        (len(each.prompt), len(each.prompt + each.response) - len(split_at_end(tokenizer, each.response)[2]))
        for each in earlier
    ]
    # Where turns end by the token that opens the next (GLM's), the rendering of all serves those that have one there.
    opens_by_end = any(end in last.prompt for end in [*end_texts(tokenizer)][1:])
    ended = not opens_by_end or all(split_at_end(tokenizer, each.response)[1] is not None for each in earlier)
    if ended and all(last.prompt.startswith(each.prompt + each.response) for each in earlier):
        return [replace(last, turns=spans)]
    return [*earlier, last]


def generation_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None) -> str:
    """The text that generation starts from. Raises as `dialogue_texts`."""
    messages = as_template_reads(tokenizer, messages, tools)
    text = render(tokenizer, messages, tools, add_generation_prompt=True)
    check_system(tokenizer, messages, tools, text)
    return text


def _turn_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> tuple[str, str]:
    """The text that generation of the last message starts from, and what the template writes for it after that."""
    *before, turn = messages
    opened = render(tokenizer, before, tools, add_generation_prompt=True)
    closed = render(tokenizer, messages, tools)
    opening = opened_by(tokenizer, opened)
    if closed.startswith(opened):
        prompt, response = opened, closed[len(opened) :]
    else:
        probed = render(tokenizer, [*before, {"role": turn["role"], "content": PROBE}], tools)
        written = render(tokenizer, before, tools)
        generation_prompt = common_length(opened, written)  # where it begins
        cut = min(common_length(opened, probed), common_length(opened, closed))
        start = opened.rindex(opening.opens) if opening else cut
        if opening and start < cut < start + len(opening.opens):  # marks may begin alike: <|START_RESPONSE|>
            cut = start
        header = opened[generation_prompt:]
        words = before[-1]["content"].strip()
        if not header.strip() and words and words in opened:  # no generation prompt: a turn follows the words before it
            header = words + opened.rpartition(words)[2]
        begins = closed.rfind(header, 0, common_length(closed, probed)) if header.strip() else -1
        if cut >= generation_prompt:  # it opens what the turn does not have, as a thought
            prompt, response = opened, closed[cut:]
        elif begins >= 0:  # messages before the turn are written otherwise
            prompt, response = opened, closed[begins + len(header) :]
            if before[-1]["role"] == "assistant" and common_length(closed, written) >= begins + len(header) > len(
                header
            ):
                raise BadRow("the chat template joins an assistant turn to the one before it; join them in the row")
        else:
            raise BadRow("the chat template renders the prompt differently if a response follows")
    marks = marks_in(tokenizer, turn["content"])
    thought, closes, answer = turn["content"].rpartition(marks.closes)
    if opened.rstrip().endswith(marks.closes) and (closes or marks.closes in response):
        raise BadRow(f"reasoning before {marks.closes} in a turn, and a generation prompt that has closed it")
    if answer.strip() not in response and PROBE not in render(tokenizer, [*before, {**turn, "content": PROBE}], tools):
        if turn.get("tool_calls"):
            raise BadRow("the chat template does not write the text beside `tool_calls`; leave out one of the two")
        raise BadRow("the chat template does not write the text of a turn; it may be one for images")
    if not closes and opening and opening.closes not in response:
        spaced = opening == THINK and opened.endswith("\n")
        return prompt, (f"\n{opening.closes}\n\n" if spaced else opening.closes) + response
    if not closes or (marks.closes in response and thought.split(marks.opens)[-1].strip() in response):
        return prompt, response
    # The template leaves the reasoning out even here, where generation would write it.
    if not response.lstrip().startswith(answer.strip()):
        raise BadRow(f"the chat template writes a turn otherwise than with or without what is before {marks.closes}")
    whole = thought + closes + answer[: len(answer) - len(answer.lstrip())] + response.lstrip()
    if opened.rstrip().endswith(marks.opens):
        whole = whole.lstrip().removeprefix(marks.opens)
        whole = whole if opened.endswith(marks.opens) else whole.lstrip()
    return opened, whole


def _end_by_next(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools, response: str) -> str:
    """The end token that the last of the messages opens with, where the template ends the turn before it with none (GLM's)."""
    if split_at_end(tokenizer, response)[1] is not None:
        return ""
    *before, following = messages
    opening = render(tokenizer, [*before, {**following, "content": PROBE}], tools).rpartition(PROBE)[0]
    closed = render(tokenizer, before, tools)
    ends = [end for end in end_texts(tokenizer) if opening.count(end) > closed.count(end)]
    return max(ends, key=opening.rfind, default="")
