"""Labeled rows to instructions with Jinja templates and verbalized labels, and answers back to labels.

Templates are rendered like chat templates, sandboxed and without a loader: a recipe runs no code of its own, and the
text of a row is never interpreted as a template.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os.path
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes

from align.config.convert import key_text
from align.config.data_source import (
    LABEL_VARIABLE,
    SYSTEM_PART,
    TEXT_PARTS,
    DataSource,
    read_columns,
    template_environment,
)
from align.config.sandbox import TemplateProblem, render
from align.config.sandbox_process import FAILED, LIMIT, NULL, SECURITY, SYNTAX, UNDEFINED
from align.errors import BadRow, UserError, first_few, nearest

# Keys of a row's `extra` besides its columns. For `parse_label`: the template that rendered the row (a mapping of strings),
# the source's `labels`, and the row's own key among them (without `labels`, its label as text).
TASK, TEMPLATE, LABELS, LABEL = "task", "_template", "_labels", "_label"
RENDERINGS = (
    "_renderings"  # with named templates: the row as written by each of them but the first, which wrote the row itself
)
_ROW = "row"  # the variable with all columns, for column names that are not valid Jinja names
_ANYTHING = r"[\s\S]*?"
_SPLIT = re.compile(r"(^|[-_.])(train|training|test|validation|valid|val|dev|eval|evaluation)$", re.IGNORECASE)


def task_name(source: DataSource) -> str:
    """The source's `task`; by default the name of its generator, hub data set or file, without a suffix such as `_train`."""
    if source.task or source.path is None:
        return str(source.task or source.generator)
    folder, file = os.path.split(source.path)
    if "." not in file and not glob.has_magic(file):
        return source.name or file
    stem = file.split(".")[0]
    task = _SPLIT.sub("", stem)
    return task if task and not glob.has_magic(task) else os.path.basename(folder) or stem


class SourceTemplates:
    """The templates of one source. Which of them renders a row depends on the seed, the source and the row alone."""

    def __init__(
        self,
        source: DataSource,
        seed: int,
        columns: Sequence[str],
        named: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """
        Args:
            columns: the union of the columns of the source's rows.
            named: templates by name, in place of the source's, each of which renders every row.

        Raises:
            UserError: there are `labels`, and no row has the label column.
        """
        self.source = source
        self.columns = columns
        self.name = str(source.path or source.generator)
        self.every = bool(named)
        self.templates = (
            {f"templates.{name}": template for name, template in named.items()}
            if named
            else {f"templates[{index}]": template for index, template in enumerate(source.templates)}
        )
        self.draw = f"{seed} template {os.path.basename(self.name)}\n".encode()
        if source.labels and source.label_column not in columns:
            raise UserError(
                f"{self.name}: no column `{source.label_column}` for `labels`; its columns are {first_few(columns)}"
                f"{nearest(source.label_column, columns) or '.'} Name the right one as `label_column` in the recipe."
            )

    def apply(self, line: bytes, where: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Render a row to `prompt` and `completion`, with the entries for its `extra` besides its columns: once, or with named
        templates by each of them in order.

        Args:
            line: the row as JSON; templates see its values only.
            where: file and row, for errors.

        Raises:
            BadRow: the row lacks a column that its template reads, or its label is not among `labels`.
            UserError: no row has that column, or the template breaks a rule of the sandbox.
        """
        values = json.loads(line)
        digest = hashlib.sha256(self.draw + line).digest()
        drawn = int.from_bytes(digest[:8], "big") % len(self.templates)
        places = list(self.templates) if self.every else [list(self.templates)[drawn]]
        return [self._apply_one(place, values, where) for place in places]

    def _apply_one(self, place: str, values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        template = self.templates[place]
        extra: dict[str, Any] = {TEMPLATE: template, LABELS: self.source.labels}
        variables = {_ROW: values, **values}
        if (label := values.get(self.source.label_column)) is not None:
            extra[LABEL] = key_text(label)
            variables[LABEL_VARIABLE] = self.source.labels.get(extra[LABEL], label)
        if self.source.labels and extra.get(LABEL) not in self.source.labels:
            got = "null" if label is None else key_text(label)
            raise BadRow(f"label {got} is not among `labels` ({', '.join(self.source.labels)})")
        rendered = {part: self._render(f"{place}.{part}", text, variables, where) for part, text in template.items()}
        if TEXT_PARTS[0] in rendered:
            return rendered, extra
        roles = [role for role in (SYSTEM_PART, "user") if role in rendered]
        messages = [{"role": role, "content": rendered[role]} for role in roles]
        return {"prompt": messages, "completion": [{"role": "assistant", "content": rendered["assistant"]}]}, extra

    def _render(self, place: str, text: str, variables: Mapping[str, Any], where: str) -> str:
        try:
            return render(text, variables)
        except TemplateProblem as error:
            problem = error
        if problem.kind == NULL:
            raise BadRow(f"{place} {problem}")
        if problem.kind == SECURITY:
            raise UserError(f"{where}: {place}: {problem}; a template only reads columns.")
        if problem.kind in (LIMIT, SYNTAX):
            raise UserError(f"{where}: {place} {problem}; fix the template or the row.")
        if problem.kind == FAILED:  # a template may fail in any way on the row's values
            raise BadRow(f"{place} fails with {problem}")
        missing = sorted(read_columns(text) - variables.keys()) if problem.kind == UNDEFINED else []
        if not missing:
            raise BadRow(f"{place}: {problem}")
        if missing[0] in self.columns:
            raise BadRow(f"no column `{missing[0]}`, which {place} reads")
        hint = nearest(missing[0], self.columns)
        if missing[0] == LABEL_VARIABLE and not hint:
            hint = "; the column with the labels is named as `label_column`"
        raise UserError(
            f"{where}: {place} reads `{missing[0]}`, which no row has; the columns are {first_few(self.columns)}{hint or '.'}"
        )


def parse_label(text: str, template: Mapping[str, str], labels: Mapping[str, str]) -> str | None:
    """Parse the label out of a generated answer: the inverse of a template's `completion` (or `assistant`).

    The label is the one that follows the template's words before `{{ label }}`, anywhere in the answer; if the template
    has no such words, the one the answer begins with. Failing that, it is the only label that occurs in the answer, so
    "It is not positive" counts as positive. Case and whitespace are ignored.

    Args:
        text: the answer.
        template: `extra["_template"]` of the row.
        labels: `extra["_labels"]` of the row, key to text; if empty, the label is the rest of the line it is on.

    Returns:
        A key of `labels`, to compare with `extra["_label"]`; without `labels`, the text; None if there is no label.
    """
    before, after = _around_label(template.get("completion") or template["assistant"])
    if not labels:
        found = before and re.search(rf"{before}(\S.*?)(?:{after})?\s*$", text, re.IGNORECASE | re.MULTILINE)
        return found[1] if found else None
    keys = {_plain(word): label for label, word in labels.items()}
    words = "|".join(_pattern(word) for word in sorted(keys, key=len, reverse=True))  # "very good" before "good"
    if before and (found := re.search(rf"{before}({words})(?!\w)", text, re.IGNORECASE)):
        return keys[_plain(found[1])]
    occurring = {_plain(word) for word in re.findall(rf"(?<!\w)({words})(?!\w)", text, re.IGNORECASE)}
    return keys[occurring.pop()] if len(occurring) == 1 else None


def _around_label(completion: str) -> tuple[str | None, str]:
    """Regular expressions for the text before and after the label; None if the template has no label to locate."""
    before: str | None = None
    pattern = ""
    for node in template_environment().parse(completion).body:
        for part in node.nodes if isinstance(node, nodes.Output) else [node]:
            if isinstance(part, nodes.TemplateData):
                pattern += _pattern(part.data)
            elif before is None and _reads_label(part):
                before, pattern = pattern.removeprefix(r"\s+"), ""
            else:
                pattern += _ANYTHING
    if before is None or before.endswith(_ANYTHING):
        return None, ""
    return before or r"\A\s*", pattern


def _reads_label(part: nodes.Node) -> bool:
    names = [part] if isinstance(part, nodes.Name) else part.find_all(nodes.Name)
    return any(name.name == LABEL_VARIABLE for name in names)


def _pattern(words: str) -> str:
    return r"\s+".join(re.escape(word) for word in re.split(r"\s+", words))


def _plain(words: str) -> str:
    return " ".join(words.casefold().split())
