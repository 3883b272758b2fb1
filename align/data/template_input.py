"""Convert messages to the form that a chat template renders completely, and detect content that it would ignore."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat_template import render_chat, template_kwargs
from align.data.end_tokens import end_texts
from align.data.messages import INSTRUCTION_ROLES, alternates
from align.data.rows import Message, Tools
from align.data.thought_marks import marks_in, own_marks
from align.errors import BadRow, TemplateFailure, UserError

PROBE = "\N{SYMBOL FOR RECORD SEPARATOR}"  # the content of a turn that shows where a template puts contents
_OPENED = "generation_prompt_always_written"  # attribute of the tokenizer: the header, with the template that writes it
_OF_CALLS = ("tool_call_id", "name")  # keys of a tool's result that repeat its call; many templates leave them out


def as_template_reads(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools
) -> Sequence[Message]:
    """The messages in the form in which the template writes all of them, tool calls among them.

    Raises:
        BadRow: there is none; names the key that the template ignores.
    """
    messages = _with_thoughts_apart(tokenizer, messages)
    if not alternates(messages):
        _check_contents_written(tokenizer, messages, tools)
    if not tools and all(len(message) == 2 and message["role"] != "tool" for message in messages):
        return messages
    failure: BadRow | None = None
    for form in _forms(messages):
        try:
            _check_all_written(tokenizer, form, tools)
        except BadRow as error:
            failure = error if failure is None or not isinstance(failure, _ContentIgnored) else failure
        else:
            return form
    assert failure is not None
    raise failure


def check_system(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools, text: str) -> None:
    """Check that the template writes what messages of role system or developer say.

    Args:
        text: that it writes for the messages.

    Raises:
        BadRow: it ignores one.
    """
    for index, message in enumerate(messages):
        if message["role"] in INSTRUCTION_ROLES and message["content"].strip() not in text:
            probed = [*messages[:index], {**message, "content": PROBE}, *messages[index + 1 :]]
            if PROBE not in (_rendered_or_none(tokenizer, probed, tools) or ""):
                raise BadRow(
                    f"the chat template ignores messages of role {message['role']}; write them into the first user turn, or give another "
                    "template"
                )


def _with_thoughts_apart(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with the reasoning in their content as `reasoning_content`, where the template reads it there alone.

    Such a template would write an empty thought before the one in the content.
    """
    marks = own_marks(tokenizer)
    opens, closes = marks.opens, marks.closes

    def thinks(message: Message) -> bool:
        return message["role"] == "assistant" and closes in message["content"] and "reasoning_content" not in message

    if not any(map(thinks, messages)):
        return messages
    answers = [
        {"content": "?"},
        {"content": f"{opens}\n?\n{closes}\n\n?"},
        {"content": "?", "reasoning_content": PROBE},
    ]
    asked = {"role": "user", "content": "?"}
    texts = [_rendered_or_none(tokenizer, [asked, {"role": "assistant", **answer}], None) or "" for answer in answers]
    none, inside, separate = (text.count(closes) for text in texts)
    if not (none and inside > none and separate == none and PROBE in texts[2]):
        return messages
    found: list[Message] = []
    for message in messages:
        if thinks(message):
            thought, _, answer = message["content"].rpartition(closes)
            thought = thought.strip().removeprefix(opens).strip()
            message = {**message, "content": answer.lstrip(), "reasoning_content": thought}
        found.append(message)
    return found


class _ContentIgnored(BadRow):
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
        if render(tokenizer, [*before, message], tools) == _rendered_or_none(tokenizer, without, tools):
            what = f"`{key}` in a message" if key else f"messages of role {role}"
            remedy = (
                f"; write it into `content`, before {own_marks(tokenizer).closes}" if key == "reasoning_content" else ""
            )
            raise _ContentIgnored(f"the chat template ignores {what}{remedy}; leave it out, or give another template")
    if tools and render(tokenizer, messages, tools) == _rendered_or_none(tokenizer, messages, None):
        raise _ContentIgnored("the chat template ignores `tools`; leave the column out, or give another template")


def _check_contents_written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> None:
    """Check that no message is left out by a template that may not be made for turns that do not alternate.

    Raises:
        BadRow: one is.
    """
    text = render(tokenizer, messages, tools)
    for message in messages:
        answer = message["content"].rpartition(marks_in(tokenizer, message["content"]).closes)[2]
        if message["role"] != "tool" and answer.strip() not in text:
            raise BadRow(
                f"the chat template leaves out a message of role {message['role']} where turns do not alternate; "
                "join such turns, or give another template"
            )


def _rendered_or_none(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools) -> str | None:
    try:
        return render(tokenizer, messages, tools)
    except BadRow:
        return None


def render(
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
    if not add_generation_prompt:
        text = text.removesuffix(always_opened(tokenizer))
    if tokenizer.bos_token and text.startswith(2 * tokenizer.bos_token):
        raise BadRow(f"the chat template writes the begin-of-text token {tokenizer.bos_token} twice")
    return text


def always_opened(tokenizer: PreTrainedTokenizerBase) -> str:
    """The generation prompt of a template that writes one behind any messages, asked for or not; "" for other templates.

    Behind a response it is not a part of it.
    """
    template = f"{tokenizer.chat_template}{template_kwargs(tokenizer)}"
    known: tuple[str, str] = getattr(tokenizer, _OPENED, ("", ""))
    if known[0] != template:
        known = template, _header_behind_turns(tokenizer)
        setattr(tokenizer, _OPENED, known)
    return known[1]


def _header_behind_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    asked, answered = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
    try:
        opened = render_chat(tokenizer, [asked], add_generation_prompt=True)
        if opened != render_chat(tokenizer, [asked], add_generation_prompt=False):
            return ""
        last = render_chat(tokenizer, [asked, answered], add_generation_prompt=False).rpartition(PROBE)[2]
        between = render_chat(tokenizer, [asked, answered, asked], add_generation_prompt=False).partition(PROBE)[2]
    except (BadRow, TemplateFailure):  # rows will raise it
        return ""
    end = common_length(last, between)  # of a turn; headers of the next may begin alike, as `### `
    header = "" if end == len(last) else last[last.rfind("\n", 0, end) + 1 :]
    is_header = header.strip() and opened.endswith(header) and not any(end in header for end in end_texts(tokenizer))
    return header if is_header else ""


def common_length(first: str, second: str) -> int:
    """Characters that two texts begin with in common."""
    most = min(len(first), len(second))
    return next((index for index in range(most) if first[index] != second[index]), most)


def _written(message: Message) -> Iterator[str]:
    """All text of a message."""
    for key, value in message.items():
        if key != "role" and value is not None:
            yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
