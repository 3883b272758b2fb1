"""What a row is once it is checked, and what becomes of one that cannot be used."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from align.errors import BadRow, UserError

Turns = str | list[dict[str, str]]
"""Plain text, or messages with the keys `role` (system, user, assistant) and `content`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy answers. `where` names file and row (1-based); `extra` holds the row's other columns."""

    prompt: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to imitate. Plain text to continue has the prompt `""`.

    `trained_turns` counts the assistant turns to learn, from the last one backwards: 1 is the completion alone, more
    reaches into the prompt (rows that came as whole dialogues).
    """

    prompt: Turns
    completion: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)
    trained_turns: int = 1


@dataclass(frozen=True, slots=True)
class Preference:
    """Two responses to one prompt, the first preferred."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, and what to say of it: a name or id, a list of those, or a number."""

    text: str
    text_pair: str | None
    label: Any
    where: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """What must not stand on both sides, training and evaluation."""
        return self.text


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text."""

    text: str
    where: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """What must not stand on both sides, training and evaluation."""
        return self.text


Row = Prompt | Demonstration | Preference | Labelled | Passage


class BadRows:
    """Bad rows by reason."""

    def __init__(self) -> None:
        self.by_reason: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def catch(self, where: str) -> Iterator[None]:
        """Note a `BadRow` raised in the block, and go on after it."""
        try:
            yield
        except BadRow as bad:
            self.by_reason.setdefault(str(bad), []).append(where)

    def __len__(self) -> int:
        return sum(map(len, self.by_reason.values()))

    def summary(self) -> str:
        """`reason: n; reason: m`."""
        return "; ".join(f"{reason}: {len(rows)}" for reason, rows in self.by_reason.items()) or "none"

    def raise_or_report(self, on_bad_row: str) -> dict[str, dict[str, Any]]:
        """`{reason: {"count": n, "first": ["file:row", ...]}}`, at most five rows named per reason.

        Raises:
            UserError: there are bad rows and `on_bad_row` is not "skip".
        """
        if len(self) and on_bad_row != "skip":
            lines = [
                f"  {reason}: {len(rows)} ({', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''})"
                for reason, rows in self.by_reason.items()
            ]
            lines.insert(0, f"{len(self)} rows cannot be used:")
            raise UserError("\n".join([*lines, "Mend them, or leave them out with `on_bad_row: skip`."]))
        return {reason: {"count": len(rows), "first": rows[:5]} for reason, rows in self.by_reason.items()}


def label_kind(label: Any) -> str:
    """Of what kind a label is, in words.

    Raises:
        BadRow: it is of no use, whatever other rows have.
    """
    if isinstance(label, str | bool):
        return "text"
    if isinstance(label, int):
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
        raise BadRow("`label` names one twice; a list holds the labels that apply, not 0 or 1 for each")
    return f"lists of {'text' if kinds == {str} else 'whole numbers'}"


def render_text(turns: Turns) -> str:
    """Turns as a person (or an encoder) reads them: text as it is, one message as its content, more with their roles."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in turns)


def as_response(prompt: Turns, text: str) -> Turns:
    """`text` as a response of the prompt's kind: text, or one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def canonical(turns: Turns) -> list[tuple[str, str]]:
    """(role, content) pairs, the same for text as for one user message that says it."""
    if isinstance(turns, str):
        return [("user", turns.strip())]
    return [(message["role"], message["content"].strip()) for message in turns]
