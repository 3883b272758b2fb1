"""Tables on standard output, for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def make_console() -> Console:
    """Standard output: rich on a terminal, plain text of fixed width otherwise; markup in text is not interpreted."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False)


def make_table(title: str, *columns: str) -> Table:
    """An empty table in the style of this package."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2)
    for column in columns:
        table.add_column(column, overflow="fold")
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
    text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")
    return "<br>".join(text.strip().splitlines())
