"""A raw row, in any of TRL's formats, becomes a `Prompt`, a `Demonstration` or a `Preference`, or a `BadRow`.

Formats: prompt-completion, messages, text, preference with an explicit or implicit prompt, prompt only; each as text or
as messages. Anthropic HH transcripts count as messages. `Labelled` and `Passage` rows hold text as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.rows import (
    Demonstration,
    Labelled,
    Passage,
    Preference,
    Prompt,
    Row,
    Turns,
    as_response,
    canonical,
    label_kind,
)
from align.errors import BadRow, UserError, nearest

Format = tuple[str, ...]  # the columns that a row is read from
PAIR: Format = ("chosen", "rejected")  # with a `prompt` column, or implying its prompt

# What each form can be made of, first choice first.
FORMATS: dict[type, list[Format]] = {
    Preference: [PAIR],
    Demonstration: [("prompt", "completion"), ("messages",), PAIR, ("text",)],
    Prompt: [("prompt", "completion"), ("messages",), PAIR, ("prompt",), ("text",)],
    Labelled: [("text", "text_pair", "label"), ("text", "label")],
    Passage: [("text",)],
}


def choose_formats(source: str, columns: Sequence[str], form: type) -> list[Format]:
    """The formats in which rows with these columns can give `form`.

    Raises:
        UserError: there are none.
    """
    formats = [names for names in FORMATS[form] if set(names) <= set(columns)]
    if not formats:
        closest = min(FORMATS[form], key=lambda names: len(set(names) - set(columns)))
        missing = next(name for name in closest if name not in columns)
        raise missing_column(
            source, missing, columns, f"; this stage reads {' or '.join('+'.join(names) for names in FORMATS[form])}"
        )
    return formats


def missing_column(source: str, missing: str, columns: Sequence[str], more: str = "") -> UserError:
    """The error for a column that a source does not have."""
    return UserError(
        f"{source}: no column `{missing}`; its columns are {', '.join(columns)}{nearest(missing, columns)}{more}. "
        "Name the right one under `columns:` (ours: theirs) in the recipe."
    )


def read_row(values: Mapping[str, Any], where: str, form: type, formats: Sequence[Format]) -> Row:
    """One row as `form`, read in the first of `formats` whose columns it fills.

    Raises:
        BadRow: it cannot be used.
    """
    filled = [names for names in formats if all(values.get(name) is not None for name in names)]
    if not filled:
        missing = next(name for name in formats[0] if values.get(name) is None)
        raise BadRow(f"missing field `{missing}`")
    columns = filled[0]
    if form in (Labelled, Passage):
        return _texts(values, where, columns, form)
    read = {"prompt"} if form is Prompt and values.get("prompt") is not None else {"prompt", *columns}
    extra = {name: value for name, value in values.items() if name not in read}
    if columns == PAIR:
        prompt, chosen, rejected = _pair(values)
        if form is Preference:
            return Preference(prompt, chosen, rejected, where, extra)
        return Prompt(prompt, where, extra) if form is Prompt else Demonstration(prompt, chosen, where, extra)
    given, learnt = _given_and_learnt(values, columns)
    if form is Prompt:
        return Prompt(_prompt(given, learnt), where, extra)
    _check(given, learnt)
    if isinstance(given, str) or isinstance(learnt, str):
        return Demonstration(given, learnt, where, extra)
    dialogue = [*given, *learnt]
    first = [message["role"] for message in dialogue].index("user")  # an opening assistant turn answers nothing
    trained = sum(message["role"] == "assistant" for message in dialogue[max(first, len(given)) :])
    return Demonstration(dialogue[:-1], dialogue[-1:], where, extra, trained)


def _texts(values: Mapping[str, Any], where: str, columns: Format, form: type) -> Row:
    extra = {name: value for name, value in values.items() if name not in columns}
    for name in columns:
        value = values[name]
        if name != "label" and not isinstance(value, str):
            raise BadRow(f"`{name}` is not text")
        if isinstance(value, str) and not value.strip():
            raise BadRow(f"empty `{name}`")
    if form is Passage:
        return Passage(values["text"], where, extra)
    label_kind(values["label"])
    return Labelled(
        values["text"], values["text_pair"] if "text_pair" in columns else None, values["label"], where, extra
    )


def _given_and_learnt(values: Mapping[str, Any], columns: Format) -> tuple[Turns, Turns]:
    first = _turns(values, columns[0])
    if columns == ("prompt",):
        return first, first[:0]
    if columns == ("prompt", "completion"):
        prompt, completion = _one_kind(first, _turns(values, "completion"))
        return prompt, _without_prompt(prompt, completion)
    if columns == ("messages",) and isinstance(first, str):
        raise BadRow("`messages` is not a list of messages")
    return first[:0], first


def _pair(values: Mapping[str, Any]) -> tuple[Turns, Turns, Turns]:
    prompt: Turns
    chosen, rejected = _turns(values, "chosen"), _turns(values, "rejected")
    explicit = values.get("prompt") is not None
    if explicit:
        prompt, chosen, rejected = _one_kind(_turns(values, "prompt"), chosen, rejected)
        chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
    elif type(chosen) is not type(rejected):
        raise BadRow("one of `chosen` and `rejected` is text, the other messages")
    if canonical(chosen) == canonical(rejected):
        raise BadRow("`chosen` equals `rejected`")
    if not explicit:
        size = _common_size(chosen, rejected)
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    for answer in (chosen, rejected):
        _check(prompt, answer)
        if isinstance(answer, list) and len(answer) > 1:  # a policy answers in one turn
            raise BadRow("`chosen` or `rejected` has more than one turn after the prompt")
    return prompt, chosen, rejected


def _common_size(chosen: Turns, rejected: Turns) -> int:
    """Length of the implicit prompt: the turns that lead both dialogues, or the words that lead both texts."""
    text = isinstance(chosen, str)
    most = min(len(chosen), len(rejected))
    size = next((index for index in range(most) if chosen[index] != rejected[index]), most)
    if text:
        # Back to the last space, which goes to the responses: no word is split between prompt and response.
        last_word = re.search(r"\s+\S*\Z", str(chosen[:size]))
        size = last_word.start() if last_word else 0
    if size == 0:
        raise BadRow("`chosen` and `rejected` have no common prompt")
    return size


def _prompt(given: Turns, learnt: Turns) -> Turns:
    if isinstance(given, str) or isinstance(learnt, str):
        if not given:
            raise BadRow("plain text has no prompt")
        return given
    dialogue = [*given, *learnt]
    if learnt and learnt[-1]["role"] == "assistant":
        dialogue.pop()
    _check_order(dialogue)
    if not dialogue or dialogue[-1]["role"] != "user":
        raise BadRow("the prompt does not end in a user turn")
    return dialogue


def _check(prompt: Turns, response: Turns) -> None:
    if not response or (isinstance(response, str) and not response.strip()):
        raise BadRow("empty response")
    if isinstance(prompt, str) or isinstance(response, str):
        return
    dialogue = [*prompt, *response]
    _check_order(dialogue)
    if response[-1]["role"] != "assistant":
        raise BadRow("does not end in an assistant turn")
    if all(message["role"] != "user" for message in dialogue):
        raise BadRow("no user turn before the response")


def _check_order(messages: Sequence[Mapping[str, str]]) -> None:
    """A system message or none, then user and assistant in turn, each of whom says something."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for index, message in enumerate(turns):
        if message["role"] == "system" or (index and message["role"] == turns[index - 1]["role"]):
            raise BadRow("messages do not alternate between user and assistant")
        if not message["content"].strip():
            last = index == len(turns) - 1 and message["role"] == "assistant"
            raise BadRow("empty response" if last else "empty turn")


def _one_kind(prompt: Turns, *answers: Turns) -> Sequence[Any]:
    """The prompt and its answers: all messages if one of them is, else all text."""
    if all(isinstance(turns, str) for turns in (prompt, *answers)):
        return prompt, *answers
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return prompt, *(as_response(prompt, turns.strip()) if isinstance(turns, str) else turns for turns in answers)


def _without_prompt(prompt: Turns, answer: Turns) -> Turns:
    """The answer to a message prompt, also where it came as the whole dialogue."""
    if isinstance(prompt, list) and isinstance(answer, list) and canonical(answer[: len(prompt)]) == canonical(prompt):
        return answer[len(prompt) :]
    return answer


_TRANSCRIPT = re.compile(r"\n\nHuman:|\s*Human:(?=.*\n\nAssistant:)", re.DOTALL)
_SPEAKER = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _turns(values: Mapping[str, Any], name: str) -> Turns:
    """A field as text or as messages with nothing but `role` and `content`; a transcript becomes messages."""
    value = values[name]
    if isinstance(value, str):
        if name == "prompt" and not value.strip():
            raise BadRow("empty prompt")
        if not _TRANSCRIPT.match(value):
            return value
        _, *pieces = _SPEAKER.split(value)
        messages = [
            {"role": _ROLES[speaker], "content": said.strip()}
            for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
        ]
        if name == "prompt" and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # the cue for the response
        return messages
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is neither text nor a list of messages")
    if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in value):
        raise BadRow(f"`{name}` holds something else than messages with `role` and `content`")
    for message in value:
        if message["role"] not in ("system", "user", "assistant"):
            raise BadRow(f"role {message['role']!r} is not system, user or assistant")
    return [{"role": message["role"], "content": message["content"]} for message in value]
