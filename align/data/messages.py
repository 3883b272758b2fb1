"""Text and messages of a row in the form that templates read, checked so that nothing is silently dropped.

A message has `role` and `content`. Any further key (`reasoning_content`, `tool_calls`, `name`, ...) is kept for the chat
template; `align.data.dialogues` refuses the ones that it ignores. `train` and `weight` select the turns that are trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from align.data.rows import Message, Turns
from align.errors import BadRow

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTION_ROLES = ("system", "developer")  # the roles that open a dialogue, and answer nothing
FLAGS = ("train", "weight")  # whether an assistant turn is trained
# The roles that follow each where turns alternate.
_AFTER = {
    **dict.fromkeys(INSTRUCTION_ROLES, ("user", "assistant")),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_EMPTY: tuple[Any, ...] = (None, "", [], {})  # what columns of one type hold where a message lacks the key


_TRANSCRIPT = re.compile(r"\n\nHuman:|\s*Human:(?=.*\n\nAssistant:)", re.DOTALL)
_SPEAKER = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def read_turns(values: Mapping[str, Any], name: str) -> Turns:
    """A field as text, or as messages; a transcript becomes messages.

    Raises:
        BadRow: as `read_messages`, or it is neither.
    """
    value = values[name]
    if isinstance(value, str):
        if name == "prompt" and not value:
            raise BadRow("empty prompt")
        if not _TRANSCRIPT.match(value):
            return value
        _, *pieces = _SPEAKER.split(value)
        messages = [
            {"role": _ROLES[speaker], "content": content.strip()}
            for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
        ]
        if name == "prompt" and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # the cue for the response
        return messages
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is neither text nor a list of messages")
    system = values.get("system") if name == "conversations" else None
    return read_messages([*([{"role": "system", "content": system}] if system else []), *value], name)


def read_messages(value: Sequence[Any], name: str) -> list[Message]:
    """The messages of the field `name`; a flag is left in them as `train`, until `without_flags`.

    Raises:
        BadRow: something else than messages, or a message with a key that has a value of the wrong kind.
    """
    wrong = BadRow(f"`{name}` holds entries other than messages with `role` and `content`")
    value = [_from_sharegpt(message) if isinstance(message, Mapping) else message for message in value]
    if not all(isinstance(message, Mapping) and "role" in message for message in value):
        raise wrong
    for message in value:
        if message["role"] not in ROLES:
            raise BadRow(f"role {message['role']!r} is not system, developer, user, assistant or tool")
    messages = [_read_message(message) for message in value]
    if any(not isinstance(message["content"], str) for message in messages):
        raise wrong
    return messages


def _from_sharegpt(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message of ShareGPT's form, with `from` and `value`, as one with `role` and `content`."""
    if "role" in message or not {"from", "value"} <= message.keys():
        return message
    more = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**more, "role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}


def _read_message(message: Mapping[str, Any]) -> Message:
    role = message["role"]
    more = {str(key): value for key, value in message.items() if value not in _EMPTY}
    content = _text(more.pop("content", message.get("content")))
    flags = [_flag(key, more.pop(key), role) for key in FLAGS if key in more]
    if len(set(flags)) > 1:
        raise BadRow("`train` and `weight` of a message disagree")
    more.pop("role")
    for key in ("tool_calls", "reasoning_content"):
        if key in more and role != "assistant":
            raise BadRow(f"`{key}` in a message of role {role}")
    if not isinstance(more.get("reasoning_content", ""), str):
        raise BadRow("`reasoning_content` is not text")
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"])
        content = "" if content is None else content
    return {"role": role, "content": content, **more, **({"train": flags[0]} if flags else {})}


def _text(content: Any) -> Any:
    """Content given in parts as one text, a line for each; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"a message with a part of type {found!r}; this reads text alone")
    return "\n".join(part["text"] for part in content)


def _flag(key: str, value: Any, role: str) -> bool:
    if value not in (0, 1) or isinstance(value, bool) != (key == "train"):
        expected = "true nor false" if key == "train" else "0 nor 1"
        raise BadRow(f"`{key}` of a message is neither {expected}")
    if value and role != "assistant":
        raise BadRow(f"`{key}` of a message of role {role}; only assistant turns are trained")
    return bool(value)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls, with arguments that are JSON text read: templates write them as JSON, which would quote a text again."""
    wrong = BadRow("`tool_calls` is not a list of calls with `name` and `arguments`")
    calls = _json(value)
    if not isinstance(calls, list):
        raise wrong
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise wrong
        arguments = _json(function.get("arguments", {}))
        if not isinstance(arguments, Mapping):
            raise wrong
        function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def read_tools(extra: dict[str, Any], turns: Turns) -> None:
    """Put the column `tools`, JSON text or a list of functions' schemas, in the form that templates take.

    Args:
        extra: of a row, with the column if it has one.
        turns: the row's messages, or text.

    Raises:
        BadRow: it is neither, or stands beside plain text.
    """
    if extra.get("tools") in _EMPTY:
        return
    if isinstance(turns, str):
        raise BadRow("`tools` beside plain text; they need a prompt of messages, for a chat template that lists them")
    tools = _json(extra["tools"])
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("`tools` is neither a list of functions nor the JSON text of one")
    extra["tools"] = [dict(tool) for tool in tools]


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def without_flags(messages: Sequence[Message]) -> list[Message]:
    """The messages without the flags that select the turns to train."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def check_order(messages: Sequence[Message]) -> None:
    """Results of tools follow calls, and no turn is empty. In which order the other roles may come, the chat template decides.

    Raises:
        BadRow: the first rule that is broken.
    """
    turns = messages[1:] if messages and messages[0]["role"] in INSTRUCTION_ROLES else messages
    for index, message in enumerate(turns):
        role, before = message["role"], turns[index - 1]["role"] if index else None
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRow("a message of role tool that answers no assistant turn")
        if role != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            last = index == len(turns) - 1 and role == "assistant"
            kind = "a turn of white space alone" if message["content"] else "empty turn"
            raise BadRow("empty response" if last else kind)


def alternates(messages: Sequence[Message]) -> bool:
    """Whether user and assistant take turns, after at most one system message, with results of tools after calls."""
    return all(later["role"] in _AFTER[earlier["role"]] for earlier, later in pairwise(messages))
