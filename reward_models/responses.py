"""The interface of reward sources: a batch of responses, the protocol, the error that shows a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeAlias

import torch

Turns: TypeAlias = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Responses:
    """B prompts with one response each.

    Attributes:
        prompts: as in the data, text or messages.
        texts: responses decoded to plain text, without special tokens.
        completions: responses in the form of their prompts: text, or a list with one assistant message.
        prompt_ids: the policy's token ids, unpadded.
        response_ids: the policy's token ids, unpadded, with the end-of-text id if the response has one.
        columns: other columns of the data, B entries each.
        reasoning: what `texts` and `completions` leave out before the answer; empty, or B texts, "" where it is nothing.
    """

    prompts: list[Turns]
    texts: list[str]
    completions: list[Turns]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    reasoning: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> Responses:
        """One row as a batch of size 1."""
        names = [part.name for part in fields(self) if part.name != "columns"]
        own = {name: getattr(self, name)[index : index + 1] for name in names}
        return Responses(**own, columns={name: [values[index]] for name, values in self.columns.items()})


class RewardSource(Protocol):
    """Anything with a name that turns B responses into B scores, or scores of their tokens."""

    name: str

    def score(self, batch: Responses) -> torch.Tensor:
        """Scores [B], or [B, T] of single tokens, 0 after the response; float32, on the CPU.

        NaN if and only if the source does not apply to the row.
        """
        ...


def row_error(name: str, batch: Responses, row: int, problem: str) -> ValueError:
    """An error of the reward `name` on one row, which shows the prompt and the response."""

    def shown(turns: Turns) -> str:
        text = repr(turns)
        return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"

    message = "; ".join(line.strip() for line in problem.splitlines() if line.strip()).rstrip(".")
    return ValueError(
        f"reward {name!r}, row {row} of {len(batch)}: {message}; "
        f"prompt: {shown(batch.prompts[row])}; response: {shown(batch.completions[row])}"
    )


def passes(lengths: Sequence[int], most: int, least: int = 4) -> list[list[int]]:
    """Row indices of each forward pass without gradients, longest rows first, so that passes have little padding.

    There are at least `least` passes if there are enough rows, with at most `most` rows each. The sizes of the passes
    depend on the number of rows alone, so that ranks with equally many rows stay in step under ZeRO-3.
    """
    size = min(most, max(8, -(-len(lengths) // least)))
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]
