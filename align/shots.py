"""Worked examples before a prompt, drawn from the training rows: in-context learning, the baseline that tuning must beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

from align.config import UserError
from align.data import Demonstration, Turns

SEPARATOR = "\n\n"  # between examples of plain text


def pools(training: Sequence[Demonstration]) -> dict[tuple[object, bool], list[Demonstration]]:
    """The rows that may serve as examples, by `kind`, each once however much weight it has."""
    found: dict[tuple[object, bool], list[Demonstration]] = {}
    for row in {id(row): row for row in training}.values():
        found.setdefault(kind(row), []).append(row)
    return found


def kind(row: Demonstration) -> tuple[object, bool]:
    """What an example must share with the row that it is for: the task, where rows name one, and being text or messages."""
    return row.extra.get("task"), isinstance(row.prompt, str)


def draw(pool: Sequence[Demonstration], count: int, seed: str) -> list[Demonstration]:
    """`count` different rows; of two counts, the examples of the smaller are the first of the larger's.

    Raises:
        UserError: there are not as many.
    """
    if count > len(pool):
        task = f" of task {pool[0].extra['task']!r}" if pool and "task" in pool[0].extra else ""
        raise UserError(
            f"num_shots: expected at least {count} training rows{task} to take examples from, found {len(pool)}; "
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
