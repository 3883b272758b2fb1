"""Few-shot prompts (in-context learning): examples from the training rows before the prompt of an evaluation row."""

from __future__ import annotations

import random
from collections.abc import Sequence

from align.data.messages import INSTRUCTION_ROLES
from align.data.rows import Demonstration, Turns
from align.data.templates import TASK
from align.errors import UserError

SEPARATOR = "\n\n"  # between examples of plain text
Kind = tuple[object, bool]  # task, and whether rows are text rather than messages


def example_pools(training: Sequence[Demonstration]) -> dict[Kind, list[Demonstration]]:
    """Training rows by kind, each of them once, however often its source's weight repeats it."""
    pools: dict[Kind, list[Demonstration]] = {}
    for row in {id(row): row for row in training}.values():
        pools.setdefault(_kind(row), []).append(row)
    return pools


def pool_for(row: Demonstration, pools: dict[Kind, list[Demonstration]]) -> list[Demonstration]:
    """Candidate examples for a row: those of its task, or of all tasks if its own has no training rows."""
    task, is_text = _kind(row)
    same_task = pools.get((task, is_text))
    return same_task or [each for (_, text), rows in pools.items() if text == is_text for each in rows]


def _kind(row: Demonstration) -> Kind:
    return row.extra[TASK], isinstance(row.prompt, str)


def draw_examples(pool: Sequence[Demonstration], count: int, seed: str) -> list[Demonstration]:
    """`count` different rows. With the same seed, fewer examples are a prefix of more.

    Raises:
        UserError: the pool has fewer rows.
    """
    if count > len(pool):
        task = pool[0].extra[TASK] if pool else None
        raise UserError(
            f"num_shots: expected at least {count} training rows of task {task!r} to take examples from, found {len(pool)}; "
            "give more training rows, or lower num_shots."
        )
    generator = random.Random(seed)
    chosen: dict[int, Demonstration] = {}
    while len(chosen) < count:
        index = generator.randrange(len(pool))
        chosen.setdefault(index, pool[index])
    return list(chosen.values())


def few_shot_prompt(row: Demonstration, examples: Sequence[Demonstration]) -> Turns:
    """The row's prompt after the examples.

    Text: prompt and completion of each example, as in training, separated by blank lines. Messages: the examples'
    turns without their system (or developer) messages, after the row's own.
    """
    if isinstance(row.prompt, str):
        texts = [f"{example.prompt}{example.completion}".rstrip() for example in examples]
        return SEPARATOR.join([*texts, row.prompt])
    system = [turn for turn in row.prompt[:1] if turn["role"] in INSTRUCTION_ROLES]
    turns = [
        turn
        for example in examples
        for turn in (*example.prompt, *example.completion)
        if isinstance(turn, dict) and turn["role"] not in INSTRUCTION_ROLES
    ]
    return [*system, *turns, *row.prompt[len(system) :]]


def ends_at_separator(examples: Sequence[Demonstration]) -> bool:
    """Whether a response after these examples ends at a blank line: they are text, and no completion contains one."""
    return bool(examples) and all(
        isinstance(each.completion, str) and SEPARATOR not in each.completion.strip() for each in examples
    )
