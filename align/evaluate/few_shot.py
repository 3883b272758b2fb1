"""Worked examples before a prompt, drawn from the training rows: in-context learning, the baseline that tuning must beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

from align.data.rows import Demonstration, Turns
from align.data.templates import TASK
from align.errors import UserError

SEPARATOR = "\n\n"  # between examples of plain text


def pools(training: Sequence[Demonstration]) -> dict[tuple[object, bool], list[Demonstration]]:
    """The rows that may serve as examples, by `kind`, each once however much weight it has."""
    found: dict[tuple[object, bool], list[Demonstration]] = {}
    for row in {id(row): row for row in training}.values():
        found.setdefault(kind(row), []).append(row)
    return found


def pool_for(row: Demonstration, found: dict[tuple[object, bool], list[Demonstration]]) -> list[Demonstration]:
    """The rows of `pools` that may be examples for this one: of its task, or all when no training row is of it."""
    task, is_text = kind(row)
    own = found.get((task, is_text))
    return own or [each for (_, text), rows in found.items() if text == is_text for each in rows]


def kind(row: Demonstration) -> tuple[object, bool]:
    """What an example shares with the row that it is for: the task, and being text or messages."""
    return row.extra[TASK], isinstance(row.prompt, str)


def draw(pool: Sequence[Demonstration], count: int, seed: str) -> list[Demonstration]:
    """`count` different rows; of two counts, the examples of the smaller are the first of the larger's.

    Raises:
        UserError: there are not as many.
    """
    if count > len(pool):
        task = pool[0].extra[TASK] if pool else None
        raise UserError(
            f"num_shots: expected at least {count} training rows of task {task!r} to take examples from, found {len(pool)}; "
            "give more training rows, or lower num_shots."
        )
    random_ = random.Random(seed)
    chosen: dict[int, Demonstration] = {}
    while len(chosen) < count:
        index = random_.randrange(len(pool))
        chosen.setdefault(index, pool[index])
    return list(chosen.values())


def with_examples(row: Demonstration, examples: Sequence[Demonstration]) -> Turns:
    """The row's prompt after the examples: messages as earlier turns behind the row's own system message, text as text.

    Examples of text stand as training has them, response right behind the prompt, with blank lines between them.
    """
    if isinstance(row.prompt, str):
        texts = [f"{example.prompt}{example.completion}".rstrip() for example in examples]
        return SEPARATOR.join([*texts, row.prompt])
    system = [turn for turn in row.prompt[:1] if turn["role"] == "system"]
    earlier = [
        turn
        for example in examples
        for turn in (*example.prompt, *example.completion)
        if isinstance(turn, dict) and turn["role"] != "system"
    ]
    return [*system, *earlier, *row.prompt[len(system) :]]


def ends_at_separator(examples: Sequence[Demonstration]) -> bool:
    """Whether an answer after these examples is over at a blank line: they are text, and none of their responses has one."""
    return bool(examples) and all(
        isinstance(each.completion, str) and SEPARATOR not in each.completion.strip() for each in examples
    )
