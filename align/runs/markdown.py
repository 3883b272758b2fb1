"""Text of recipes and data inside Markdown: as it reads, without becoming markup, HTML, links or code."""

from __future__ import annotations

import json
import re

from align.terminal import printable

_MARKUP = re.compile(r"[\\|`]|(?<=\])[(\[]")  # a link is `](` or `][`


def markdown_text(text: str) -> str:
    """Text in a line or in the cell of a table."""
    return "<br>".join(_MARKUP.sub(r"\\\g<0>", line) for line in _html(printable(text.strip())).splitlines())


def code_span(text: str) -> str:
    """Text as code in a line."""
    text = printable(text, one_line=True)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def python_text(text: str) -> str:
    """Text as a literal in a block of Python code."""
    return printable(json.dumps(text, ensure_ascii=False)).replace("<", r"\x3c")


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
