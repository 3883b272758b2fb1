"""One source of rows in a recipe: its keys, and the syntax of its templates."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import meta

from align.config.keys import AT_LEAST_1, TIMES, check_function_name, check_ranges, key
from align.config.sandbox import TemplateProblem, check
from align.config.sandbox_process import recipe_environment
from align.errors import UserError, nearest

ROW_COLUMNS = (
    *("prompt", "completion", "chosen", "rejected", "messages", "text", "text_pair", "label"),
    *("margin", "tie", "strength", "tools"),
)
ANNOTATION_COLUMNS = ("tokens", "tags", "spans", "question", "context", "answers")
TEXT_PARTS = ("prompt", "completion")
CHAT_PARTS = ("user", "assistant")
SYSTEM_PART = "system"
LABEL_VARIABLE = "label"  # the variable that holds the verbalized label


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One source of rows. In a recipe: a path or hub id alone, a mapping of these keys, or a list of such."""

    path: str | None = key(None, "A JSONL, JSON, Parquet or CSV file (may be gzipped; globs allowed), or a hub id.")
    generator: str | None = key(
        None, "`module:function` that yields rows, instead of a path; the module may be a file beside the recipe."
    )
    generator_kwargs: dict[str, Any] = key({}, "Keyword arguments for the generator.")
    name: str | None = key(None, "Hub data set configuration.")
    split: str = key("train", "Hub data set split.")
    columns: dict[str, str] = key(
        {},
        "Column names: ours (prompt, completion, chosen, rejected, messages, text, text_pair, label, margin, "
        "tie, strength, tools, tokens, tags, spans, question, context, answers) to the source's.",
    )
    task: str | None = key(
        None,
        "Name under which its rows are counted and evaluated; that of the file (of its folder when that is only a "
        "split's), hub data set or generator by default.",
    )
    templates: list[dict[str, str]] = key(
        [],
        "Jinja templates over the source's columns that make its rows: {prompt, completion} for plain text (the "
        "completion begins with the space or line break between them), {user, assistant} or {system, user, assistant} "
        "for messages; of several, each row draws one by seed.",
    )
    label_column: str = key("label", "With `templates`: the column that holds the label, which they read as `label`.")
    labels: dict[Any, str] = key(
        {},
        "With `templates`: what each class id or string of that column reads as, such as {0: negative, 1: positive}.",
    )
    weight: float = key(1.0, "How often each row is used per epoch; 0.5 takes a seeded half of the rows.", TIMES)
    max_rows: int | None = key(
        None, "Use only this many rows (a seeded sample); `mixture_temperature` then counts only these.", AT_LEAST_1
    )


def check_source(source: DataSource, where: str, named_templates: bool = False) -> None:
    """Check a source's keys.

    Args:
        named_templates: whether the recipe has `templates` of its own, which write the rows of all sources.

    Raises:
        UserError: begins with `where` and the key.
    """
    if (source.path is None) == (source.generator is None):
        got = "both" if source.path else "neither"
        raise UserError(f"{where}: expected either `path` or `generator`, got {got}")
    check_ranges(source, lambda name: f"{where}.{name}")
    if source.generator:
        check_function_name(source.generator, f"{where}.generator")
    known = (*ROW_COLUMNS, *ANNOTATION_COLUMNS)
    for column in source.columns:
        if column not in known:
            hint = nearest(column, known) or "; it is written `ours: theirs`"
            raise UserError(f"{where}.columns: expected names among {', '.join(known)}, got {column!r}{hint}")
    if source.templates and named_templates:
        raise UserError(
            f"{where}.templates: the recipe's own `templates` write the rows of all sources; leave one of them out."
        )
    if source.templates or named_templates:
        _check_templates(source, where)
    elif source.labels:
        raise UserError(f"{where}.labels: they have no effect without `templates`; add templates, or leave them out.")


def _check_templates(source: DataSource, where: str) -> None:
    if source.columns:
        raise UserError(f"{where}.columns: `templates` read the source's own columns by name; leave `columns` out.")
    for index, template in enumerate(source.templates):
        check_template(template, f"{where}.templates[{index}]")
    words: dict[str, str] = {}
    for label, word in source.labels.items():
        plain = " ".join(word.casefold().split())
        if not plain:
            raise UserError(f"{where}.labels.{label}: expected text, got {word!r}")
        if plain in words:
            raise UserError(
                f"{where}.labels: {word!r} stands for both {words[plain]} and {label}, so that answers would be "
                "ambiguous; give each label its own text."
            )
        words[plain] = label


def check_template(template: Mapping[str, str], where: str) -> None:
    """Check that a template has the parts it should have, and that each is valid Jinja.

    Raises:
        UserError: begins with `where`, and names the part and the line in it.
    """
    answer = CHAT_PARTS if {*CHAT_PARTS, SYSTEM_PART} & {*template} else TEXT_PARTS
    known = (SYSTEM_PART, *CHAT_PARTS) if answer == CHAT_PARTS else TEXT_PARTS
    for part in template:
        if part not in known:
            other = part in (*TEXT_PARTS, *CHAT_PARTS)
            hint = "; write {prompt, completion} or {user, assistant}" if other else nearest(part, known)
            raise UserError(f"{where}: expected the parts {', '.join(known)}, got {part!r}{hint}")
    for part in answer:
        if part not in template:
            raise UserError(f"{where}: no `{part}`; a template has the parts {', '.join(known)}.")
    for part, text in template.items():
        try:
            check(text)
        except TemplateProblem as problem:
            raise UserError(f"{where}.{part}: {problem}") from None
        named = list(meta.find_referenced_templates(template_environment().parse(text)))
        if named:
            raise UserError(f"{where}.{part}: a template cannot include another one ({named[0]}); write it out.")


@functools.cache
def read_columns(text: str) -> frozenset[str]:
    """The columns that a template reads."""
    return frozenset(
        meta.find_undeclared_variables(template_environment().parse(text)) - template_environment().globals.keys()
    )


template_environment = functools.cache(recipe_environment)  # for the syntax of templates; another process renders them
