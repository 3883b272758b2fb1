"""Tables on standard output, for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.runs.markdown import markdown_text
from align.terminal import printable


class _Console(Console):
    """A console that shows control characters as escapes, and interprets no markup."""

    def print(self, *objects: Any, **kwargs: Any) -> None:
        super().print(*map(_shown, objects), **kwargs)

    def on_broken_pipe(self) -> None:
        """Leaves the end to `align.runs.command_line.exit_code`; rich would end the process here."""
        raise BrokenPipeError


class _Table(Table):
    def add_row(self, *cells: Any, **kwargs: Any) -> None:
        super().add_row(*map(_shown, cells), **kwargs)


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Text) and (plain := printable(value.plain)) != value.plain:
        return Text(plain, value.style)  # without the styles of its parts, whose places have moved
    return value


def make_console() -> Console:
    """Standard output: rich on a terminal, plain text of fixed width otherwise; markup in text is not interpreted."""
    return _Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False)


def make_table(title: str, *columns: str) -> Table:
    """An empty table in the style of this package."""
    table = _Table(
        title=printable(title, one_line=True),
        title_justify="left",
        box=box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2,
    )
    for column in columns:
        table.add_column(printable(column), overflow="fold")
    return table


def cell(value: Any) -> str:
    """A value as shown in a table: floats with four significant digits, an empty string for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A GitHub table. Floats get four significant digits, None stays empty, text is escaped and kept on one line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return markdown_text(str(value))
