"""Which columns rows of each type are read from."""

from __future__ import annotations

from collections.abc import Sequence

from align.data.rows import Demonstration, Labelled, Passage, Preference, Prompt, Question, Tagged
from align.errors import UserError, first_few, nearest

Format = tuple[str, ...]  # the columns a row is read from
PAIR: Format = ("chosen", "rejected")  # with or without a `prompt` column
SHAREGPT: Format = ("conversations",)  # with or without a column `system`

# The formats each type of row can be read from, in order of preference.
FORMATS: dict[type, list[Format]] = {
    Preference: [PAIR],
    Demonstration: [("prompt", "completion"), ("messages",), SHAREGPT, PAIR, ("text",)],
    Prompt: [("prompt", "completion"), ("messages",), SHAREGPT, PAIR, ("prompt",), ("text",)],
    Labelled: [("text", "text_pair", "label"), ("text", "label")],
    Passage: [("text",)],
    Tagged: [("tokens", "tags"), ("text", "spans"), ("text", "entities")],
    Question: [("question", "context", "answers")],
}


def choose_formats(source: str, columns: Sequence[str], row_type: type) -> list[Format]:
    """The formats from which rows with these columns can be read as `row_type`.

    Raises:
        UserError: there are none.
    """
    known = set(columns)
    formats = [names for names in FORMATS[row_type] if set(names) <= known]
    if not formats:
        size = min(
            len(known), 2
        )  # with no column of any format: the one of as many columns as `question` and `answer` are
        closest = min(
            FORMATS[row_type],
            key=lambda names: len(set(names) - known) if set(names) & known else 9 + abs(len(names) - size),
        )
        missing = [name for name in closest if name not in known]
        reads = " or ".join("+".join(names) for names in FORMATS[row_type])
        raise missing_column(source, missing, columns, f"; this stage reads {reads}", ours=missing)
    return formats


def missing_column(
    source: str, missing: Sequence[str], columns: Sequence[str], more: str = "", *, ours: Sequence[str]
) -> UserError:
    """The error for columns that a source does not have. `ours`: names that the recipe can map to the source's."""
    hint = next(filter(None, (nearest(name, columns) for name in missing)), ".")
    example = ", ".join(f"{name}: ..." for name in ours)
    return UserError(
        f"{source}: no column {' and no '.join(f'`{name}`' for name in missing)}; its columns are {first_few(columns)}{more}"
        f"{hint} Name the right {'ones' if missing[1:] else 'one'} under `columns:` (ours: theirs) in the recipe, as in "
        f"`train_dataset: [{{path: FILE, columns: {{{example}}}}}]`."
    )
