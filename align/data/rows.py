"""The types of rows that data is read into, and the rows that cannot be read into any."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from align.errors import BadRow, TemplateFailure, UserError
from align.terminal import counted

Message = dict[str, Any]
"""`role` (system, user, assistant, tool) and `content`, both text, and keys that only some messages have, as `tool_calls`."""
Turns = str | list[Message]
"""Plain text, or messages."""
Tools = list[dict[str, Any]] | None
"""The functions that a row lists for the model, as JSON schemas."""
Span = tuple[int, int, str]
"""First character, the one after the last, and the label."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the policy to answer.

    `where` names the file and row (1-based) it came from, for error messages; `extra` holds the row's other columns.
    """

    prompt: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the completion to imitate. Plain text has the prompt `""`.

    `trained_turns` is the number of assistant turns, counted from the end, that the loss covers: 1 is the completion
    alone; rows that came as complete dialogues have more, which lie in the prompt. `untrained` are the places in the
    prompt of those among them that the row leaves out.
    """

    prompt: Turns
    completion: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)
    trained_turns: int = 1
    untrained: tuple[int, ...] = field(default=(), repr=False)  # fingerprints of earlier versions use `repr`

    @property
    def trained(self) -> list[int]:
        """Places in the prompt of the assistant turns that are trained besides the completion."""
        if isinstance(self.prompt, str):
            return []
        turns = [index for index, message in enumerate(self.prompt) if message["role"] == "assistant"]
        return [index for index in turns[len(turns) - self.trained_turns + 1 :] if index not in self.untrained]


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a preferred and a dispreferred response."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text or a pair of texts, and its label: a class name or id, a list of these, or a number to regress on."""

    text: str
    text_pair: str | None
    label: Any
    where: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text by which rows are split into training and evaluation."""
        return self.text


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text."""

    text: str
    where: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text by which rows are split into training and evaluation."""
        return self.text


@dataclass(frozen=True, slots=True)
class Tagged:
    """A text with labels inside it: `tags` of its `words`, or labeled `spans`; the other is None.

    Words are places (start, end) in characters, as are the spans (start, end, label), which are in order.
    """

    text: str
    words: tuple[tuple[int, int], ...] | None
    tags: tuple[Any, ...] | None
    spans: tuple[Span, ...] | None
    where: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text by which rows are split into training and evaluation."""
        return self.text


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the passage that may answer it, with the answers' places (start in characters, text)."""

    question: str
    context: str
    answers: tuple[tuple[int, str], ...]
    where: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> list[Message]:
        """Passage and question. Rows are held out by its first turn, so that a passage is on one side with all questions."""
        return [{"role": "user", "content": text} for text in (self.context, self.question)]


Row = Prompt | Demonstration | Preference | Labelled | Passage | Tagged | Question


class BadRows:
    """The places of rows that cannot be used, by reason."""

    def __init__(self) -> None:
        self.by_reason: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def catch(self, where: str) -> Iterator[None]:
        """Record a `BadRow` raised in the block instead of letting it propagate.

        Raises:
            UserError: a template fails for good in the block; begins with `where`.
        """
        try:
            yield
        except BadRow as bad:
            self.by_reason.setdefault(str(bad), []).append(where)
        except TemplateFailure as failure:
            raise UserError(f"{where}: {failure}") from failure

    def __len__(self) -> int:
        return sum(map(len, self.by_reason.values()))

    def summary(self) -> str:
        """`reason: n; reason: m`."""
        return "; ".join(f"{reason}: {len(rows)}" for reason, rows in self.by_reason.items()) or "none"

    def raise_or_report(
        self, on_bad_row: str, remedy: str = "leave them out with `on_bad_row: skip`"
    ) -> dict[str, dict[str, Any]]:
        """The report `{reason: {"count": n, "first": ["file:row", ...]}}`, which names at most five rows per reason.

        Args:
            remedy: what the error says can be done instead of fixing the rows.

        Raises:
            UserError: there are bad rows and `on_bad_row` is not "skip".
        """
        if len(self) and on_bad_row != "skip":
            lines = [
                f"  {reason}: {len(rows)} ({', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''})"
                for reason, rows in self.by_reason.items()
            ]
            lines.insert(0, f"{counted(len(self), 'row')} cannot be used:")
            what = "them or the template" if any("template" in reason for reason in self.by_reason) else "them"
            raise UserError("\n".join([*lines, f"Fix {what}, or {remedy}."]))
        return {reason: {"count": len(rows), "first": rows[:5]} for reason, rows in self.by_reason.items()}


def label_kind(label: Any) -> str:
    """The kind of a label, in words.

    Raises:
        BadRow: no task has such a label.
    """
    if isinstance(label, str | bool):
        return "text"
    if isinstance(label, int):
        if abs(label) >= 2**63:
            raise BadRow("`label` is too large a number")
        return "whole numbers"
    if isinstance(label, float):
        if not math.isfinite(label):
            raise BadRow("`label` is not a finite number")
        return "fractions"
    if not isinstance(label, list):
        raise BadRow("`label` is neither text nor a number nor a list")
    if not label:
        return "empty lists"
    kinds = {type(each) for each in label}
    if kinds not in ({str}, {int}):
        raise BadRow("`label` is a list, but not of names or of ids")
    if len(set(label)) < len(label):
        raise BadRow("`label` repeats a label; a list holds the labels that apply, not 0 or 1 for each")
    return f"lists of {'text' if kinds == {str} else 'whole numbers'}"


def render_text(turns: Turns) -> str:
    """Turns as readable text: text unchanged, a single message as its content, several with their roles."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return _message_text(turns[0])
    return "\n\n".join(f"{message['role'].capitalize()}: {_message_text(message)}" for message in turns)


def _message_text(message: Message) -> str:
    calls = [json.dumps(call, ensure_ascii=False, default=str) for call in message.get("tool_calls", ())]
    text = "\n".join([message["content"], *calls] if message["content"] else calls)
    reasoning = message.get("reasoning_content")
    return f"<think>\n{reasoning}\n</think>\n\n{text}" if reasoning else text


def as_response(prompt: Turns, text: str) -> Turns:
    """`text` as a response in the prompt's format: text, or one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def canonical(turns: Turns) -> list[tuple[str, str]]:
    """(role, content) pairs; text counts as one user message. Surrounding whitespace is stripped."""
    if isinstance(turns, str):
        return [("user", turns.strip())]
    return [(message["role"], message["content"].strip() + _more(message)) for message in turns]


def _more(message: Message) -> str:
    """The keys of a message other than role, content and flags, as text; usually empty."""
    more = {key: value for key, value in message.items() if key not in ("role", "content", "train")}
    return json.dumps(more, sort_keys=True, default=str) if more else ""


def tools_of(row: Row) -> Tools:
    """The functions that the row lists for the model."""
    return row.extra.get("tools") if isinstance(row.prompt, list) else None


def is_tie(row: Preference) -> bool:
    """Whether the row says that neither response is better."""
    return bool(row.extra.get("tie"))
