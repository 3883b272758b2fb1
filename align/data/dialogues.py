"""Messages to text by a chat template: each assistant turn as generation would render it.

Generation starts from the messages so far with a generation prompt; what the template writes for the next assistant turn
is the response. A template may render a turn otherwise once others follow: a thought that is dropped, an end that only a
complete dialogue has. A row whose turns all appear in one rendering is one text; otherwise it becomes one text per trained turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat_template import render_chat
from align.data.end_tokens import end_texts, split_at_end
from align.data.messages import alternates
from align.data.rows import Message
from align.errors import BadRow, UserError

THINK, END_OF_THINK = "<think>", "</think>"
PROBE = "\N{SYMBOL FOR RECORD SEPARATOR}"  # the content of a turn that shows where a template puts contents
_OF_CALLS = ("tool_call_id", "name")  # keys of a tool's result that repeat its call; many templates leave them out
Tools = list[dict[str, Any]] | None


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
    return _render(tokenizer, as_template_reads(tokenizer, messages, tools), tools, add_generation_prompt=True)


def _turn_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> tuple[str, str]:
    """The text that generation of the last message starts from, and what the template writes for it after that."""
    *before, turn = messages
    opened = _render(tokenizer, before, tools, add_generation_prompt=True)
    closed = _render(tokenizer, messages, tools)
    if closed.startswith(opened):
        prompt, response = opened, closed[len(opened) :]
    else:
        probed = _render(tokenizer, [*before, {"role": turn["role"], "content": PROBE}], tools)
        generation_prompt = _common(opened, _render(tokenizer, before, tools))  # where it begins
        cut = min(_common(opened, probed), _common(opened, closed))
        header = opened[generation_prompt:]
        words = before[-1]["content"].strip()
        if not header.strip() and words and words in opened:  # no generation prompt: a turn follows the words before it
            header = words + opened.rpartition(words)[2]
        begins = closed.rfind(header, 0, _common(closed, probed)) if header.strip() else -1
        if cut >= generation_prompt:  # it opens what the turn does not have, as a thought
            prompt, response = opened, closed[cut:]
        elif begins >= 0:  # messages before the turn are written otherwise
            prompt, response = opened, closed[begins + len(header) :]
        else:
            raise BadRow("the chat template renders the prompt differently if a response follows")
    thought, closes, answer = turn["content"].rpartition(END_OF_THINK)
    if answer.strip() not in response and PROBE not in _render(tokenizer, [*before, {**turn, "content": PROBE}], tools):
        raise BadRow("the chat template does not write the text of a turn; it may be one for images")
    if not closes and opened.rstrip().endswith(THINK) and END_OF_THINK not in response:
        return prompt, (f"\n{END_OF_THINK}\n\n" if opened.endswith("\n") else END_OF_THINK) + response
    if not closes or (END_OF_THINK in response and thought.split(THINK)[-1].strip() in response):
        return prompt, response
    # The template leaves the reasoning out even here, where generation would write it.
    if opened.rstrip().endswith(END_OF_THINK):
        raise BadRow(f"reasoning before {END_OF_THINK} in a turn, and a generation prompt that has closed it")
    if not response.lstrip().startswith(answer.strip()):
        raise BadRow(f"the chat template writes a turn otherwise than with or without what is before {END_OF_THINK}")
    written = thought + closes + answer[: len(answer) - len(answer.lstrip())] + response.lstrip()
    if opened.rstrip().endswith(THINK):
        written = written.lstrip().removeprefix(THINK)
        written = written if opened.endswith(THINK) else written.lstrip()
    return opened, written


def _end_by_next(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools, response: str) -> str:
    """The end token that the last of the messages opens with, where the template ends the turn before it with none (GLM's)."""
    if split_at_end(tokenizer, response)[1] is not None:
        return ""
    *before, following = messages
    opening = _render(tokenizer, [*before, {**following, "content": PROBE}], tools).rpartition(PROBE)[0]
    closed = _render(tokenizer, before, tools)
    ends = [end for end in end_texts(tokenizer) if opening.count(end) > closed.count(end)]
    return max(ends, key=opening.rfind, default="")


def as_template_reads(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools
) -> Sequence[Message]:
    """The messages in the form in which the template writes all of them, tool calls among them.

    Raises:
        BadRow: there is none; names the key that the template ignores.
    """
    if not alternates(messages):
        _check_contents_written(tokenizer, messages, tools)
    if not tools and all(len(message) == 2 and message["role"] != "tool" for message in messages):
        return messages
    failure: BadRow | None = None
    for form in _forms(messages):
        try:
            _check_all_written(tokenizer, form, tools)
        except BadRow as error:
            failure = error if failure is None or not isinstance(failure, _Ignored) else failure
        else:
            return form
    assert failure is not None
    raise failure


class _Ignored(BadRow):
    """The template leaves something out, rather than failing on it."""


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages, and with the arguments of tool calls as JSON text, which some templates ask for."""
    yield list(messages)
    if any(message.get("tool_calls") for message in messages):
        yield [
            {**message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def _check_all_written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> None:
    """Check by rendering without it that the template writes the last of each key beyond role and content, tool, and `tools`.

    Raises:
        BadRow: it ignores one.
    """
    seen: dict[tuple[str, str], int] = {}
    for index, message in enumerate(messages):
        for key in message:
            if key not in ("role", "content") and (message["role"] != "tool" or key not in _OF_CALLS):
                seen[message["role"], key] = index
        if message["role"] == "tool":
            seen["tool", ""] = index
    for (role, key), index in seen.items():
        before, message = messages[:index], messages[index]
        without = [*before, {name: value for name, value in message.items() if name != key}] if key else before
        if _render(tokenizer, [*before, message], tools) == _rendered_or_none(tokenizer, without, tools):
            what = f"`{key}` in a message" if key else f"messages of role {role}"
            remedy = f"; write it into `content`, before {END_OF_THINK}" if key == "reasoning_content" else ""
            raise _Ignored(f"the chat template ignores {what}{remedy}; leave it out, or give another template")
    if tools and _render(tokenizer, messages, tools) == _rendered_or_none(tokenizer, messages, None):
        raise _Ignored("the chat template ignores `tools`; leave the column out, or give another template")


def _check_contents_written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> None:
    """Check that no message is left out by a template that may not be made for turns that do not alternate.

    Raises:
        BadRow: one is.
    """
    text = _render(tokenizer, messages, tools)
    for message in messages:
        if message["role"] != "tool" and message["content"].rpartition(END_OF_THINK)[2].strip() not in text:
            raise BadRow(
                f"the chat template leaves out a message of role {message['role']} where turns do not alternate; "
                "join such turns, or give another template"
            )


def _rendered_or_none(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> str | None:
    try:
        return _render(tokenizer, messages, tools)
    except BadRow:
        return None


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path or 'tokenizer'}: the rows are messages, and the tokenizer has no chat template to render "
            "them with; name a Jinja file as `chat_template_path`."
        )
    for token in (tokenizer.bos_token, *end_texts(tokenizer)):
        if token and any(token in text for message in messages for text in _written(message)):
            raise BadRow(f"the text of the special token {token} in a message")
    text = render_chat(tokenizer, messages, add_generation_prompt, tools)
    if tokenizer.bos_token and text.startswith(2 * tokenizer.bos_token):
        raise BadRow(f"the chat template writes the begin-of-text token {tokenizer.bos_token} twice")
    return text


def _written(message: Message) -> Iterator[str]:
    """All text of a message."""
    for key, value in message.items():
        if key != "role" and value is not None:
            yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _common(first: str, second: str) -> int:
    """Characters that two texts begin with in common."""
    most = min(len(first), len(second))
    return next((index for index in range(most) if first[index] != second[index]), most)
