"""Raw rows in any of TRL's dataset formats to typed rows.

Formats: prompt-completion, messages, text, preference with an explicit or implicit prompt, prompt only; each as text or
as messages. Anthropic HH transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...") are read as messages. `Labelled` and `Passage`
rows hold their text unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.annotations import read_question, read_tagged
from align.data.columns import PAIR, SHAREGPT, Format
from align.data.messages import check_order, read_tools, read_turns, without_flags
from align.data.rows import (
    Demonstration,
    Labelled,
    Message,
    Passage,
    Preference,
    Prompt,
    Question,
    Row,
    Tagged,
    Turns,
    as_response,
    canonical,
    label_kind,
)
from align.data.strength import by_strength
from align.errors import BadRow

LARGEST_MARGIN = 1e6  # of scores, which are of a few units


def read_row(values: Mapping[str, Any], where: str, row_type: type, formats: Sequence[Format]) -> Row:
    """Read one row as `row_type` from the first of `formats` whose columns are all non-null.

    Raises:
        BadRow: no format fits, or the row has no valid prompt or response.
    """
    filled = [names for names in formats if all(values.get(name) is not None for name in names)]
    if not filled:
        missing = next(name for name in formats[0] if values.get(name) is None)
        raise BadRow(f"missing field `{missing}`")
    columns = filled[0]
    if row_type is Tagged:
        return read_tagged(values, where, columns)
    if row_type is Question:
        return read_question(values, where)
    if row_type in (Labelled, Passage):
        return _text_row(values, where, columns, row_type)
    if columns == PAIR and row_type is not Prompt and values.get("strength") is not None:
        values = by_strength(values)
    read = {"prompt"} if row_type is Prompt and values.get("prompt") is not None else {"prompt", *columns}
    extra = {name: value for name, value in values.items() if name not in read}
    _check_columns(extra, row_type)
    if columns == PAIR:
        prompt, chosen, rejected = _pair(values)
        read_tools(extra, prompt)
        if row_type is Preference:
            return Preference(prompt, chosen, rejected, where, extra)
        return Prompt(prompt, where, extra) if row_type is Prompt else Demonstration(prompt, chosen, where, extra)
    context, target = _context_and_target(values, columns)
    read_tools(extra, [*context, *target] if isinstance(context, list) and isinstance(target, list) else "")
    if row_type is Prompt:
        return Prompt(_prompt(context, target), where, extra)
    _check(context, target)
    if isinstance(context, str) or isinstance(target, str):
        return Demonstration(context, target, where, extra)
    return _demonstration(context, target, where, extra)


def _check_columns(extra: Mapping[str, Any], row_type: type) -> None:
    """Refuse columns that would change what is trained, and that are not used.

    Raises:
        BadRow: a `weight` other than 1, a `margin` or a `tie` that is none, settings of the template.
    """
    if row_type is not Prompt and extra.get("weight") not in (None, 1):
        raise BadRow("a row's `weight` other than 1; give the whole source a `weight`, or each turn one of 0 or 1")
    if extra.get("chat_template_kwargs"):
        raise BadRow("`chat_template_kwargs` in a row; set the key of that name in the recipe, for all rows")
    margin = extra.get("margin") if row_type is Preference else None
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= LARGEST_MARGIN
    ):
        raise BadRow("`margin` is not a number of at least 0, or too large a one")
    tie = extra.get("tie") if row_type is Preference else None
    if tie not in (None, False, True):  # 0 and 1 equal them
        raise BadRow("`tie` is not true, false, 1 or 0")
    if tie and margin:
        raise BadRow("a `tie` with a `margin`, by which one response would be better; write 0 there, or nothing")


def _demonstration(context: list[Message], target: list[Message], where: str, extra: dict[str, Any]) -> Demonstration:
    """The dialogue up to its last trained turn: those of `target`, or the ones that flags name."""
    dialogue = [*context, *target]
    first = [message["role"] for message in dialogue].index("user")  # an opening assistant turn answers nothing
    assistant = [index for index, message in enumerate(dialogue) if message["role"] == "assistant"]
    trained = [index for index in assistant if dialogue[index].get("train", index >= len(context) and index > first)]
    if not trained:
        raise BadRow("`train` or `weight` leaves no assistant turn to train")
    if trained[0] < first:
        raise BadRow("`train` of an assistant turn before the first user turn, which answers nothing")
    dialogue = without_flags(dialogue[: trained[-1] + 1])
    span = [index for index in assistant if trained[0] <= index <= trained[-1]]
    untrained = tuple(index for index in span if index not in trained)
    return Demonstration(dialogue[:-1], dialogue[-1:], where, extra, len(span), untrained)


def _text_row(values: Mapping[str, Any], where: str, columns: Format, row_type: type) -> Row:
    extra = {name: value for name, value in values.items() if name not in columns}
    for name in columns:
        value = values[name]
        if name != "label" and not isinstance(value, str):
            raise BadRow(f"`{name}` is not text")
        if isinstance(value, str) and not value.strip():
            raise BadRow(f"empty `{name}`")
    if row_type is Passage:
        return Passage(values["text"], where, extra)
    label_kind(values["label"])
    return Labelled(
        values["text"], values["text_pair"] if "text_pair" in columns else None, values["label"], where, extra
    )


def _context_and_target(values: Mapping[str, Any], columns: Format) -> tuple[Turns, Turns]:
    first = read_turns(values, columns[0])
    if columns == ("prompt",):
        return first, first[:0]
    if columns == ("prompt", "completion"):
        prompt, completion = _same_format(first, read_turns(values, "completion"))
        return prompt, _without_prompt(prompt, completion)
    if columns in (("messages",), SHAREGPT) and isinstance(first, str):
        raise BadRow(f"`{columns[0]}` is not a list of messages")
    return first[:0], first


def _pair(values: Mapping[str, Any]) -> tuple[Turns, Turns, Turns]:
    prompt: Turns
    chosen, rejected = _response_turns(values, "chosen"), _response_turns(values, "rejected")
    explicit = values.get("prompt") is not None
    if explicit:
        prompt, chosen, rejected = _same_format(_without_flags(read_turns(values, "prompt")), chosen, rejected)
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


def _response_turns(values: Mapping[str, Any], name: str) -> Turns:
    turns = read_turns(values, name)
    if turns and not isinstance(turns, str) and not turns[-1].get("train", True):
        raise BadRow(f"`train` or `weight` leaves out the response of `{name}`; leave the row out")
    return _without_flags(turns)


def _without_flags(turns: Turns) -> Turns:
    return turns if isinstance(turns, str) else without_flags(turns)


def _common_size(chosen: Turns, rejected: Turns) -> int:
    """Length of the implicit prompt: the turns that both dialogues start with, or the words that both texts start with."""
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


def _prompt(context: Turns, target: Turns) -> Turns:
    if isinstance(context, str) or isinstance(target, str):
        if not context:
            raise BadRow("plain text has no prompt")
        return context
    dialogue = [*context, *target]
    if target and target[-1]["role"] == "assistant":
        dialogue.pop()
    check_order(dialogue)
    if not dialogue or dialogue[-1]["role"] not in ("user", "tool"):
        raise BadRow("the prompt does not end in a user turn")
    return without_flags(dialogue)


def _check(prompt: Turns, response: Turns) -> None:
    if not response or (isinstance(response, str) and not response.strip()):
        raise BadRow("empty response")
    if isinstance(prompt, str) or isinstance(response, str):
        return
    dialogue = [*prompt, *response]
    check_order(dialogue)
    if response[-1]["role"] != "assistant":
        raise BadRow("does not end in an assistant turn")
    if all(message["role"] != "user" for message in dialogue):
        raise BadRow("no user turn before the response")


def _same_format(prompt: Turns, *answers: Turns) -> Sequence[Any]:
    """The prompt and its responses, all as messages if any of them is messages."""
    if all(isinstance(turns, str) for turns in (prompt, *answers)):
        return prompt, *answers
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return prompt, *(as_response(prompt, turns.strip()) if isinstance(turns, str) else turns for turns in answers)


def _without_prompt(prompt: Turns, answer: Turns) -> Turns:
    """The answer alone, where a row repeats the prompt's messages in it."""
    if isinstance(prompt, list) and isinstance(answer, list) and canonical(answer[: len(prompt)]) == canonical(prompt):
        return answer[len(prompt) :]
    return answer
