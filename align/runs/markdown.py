"""Text of recipes and data inside Markdown: as it reads, without becoming markup, HTML, links or code."""

from __future__ import annotations

import json
import re

from align.terminal import printable

_MARKUP = re.compile(r"[\\|`]|(?<=\])[(\[]")  # a link is `](` or `][`


def markdown_text(text: str) -> str:
    """Text in a line or in the cell of a table."""
    return _escaped(text.strip())


def markdown_line(text: str) -> str:
    """`markdown_text`, in which code spans in single backticks stay code."""
    plain, *parts = text.split("`")
    if len(parts) % 2 or "" in parts[::2]:  # a backtick without another, or nothing between two
        return markdown_text(text)
    spans = zip(parts[::2], parts[1::2], strict=True)
    return _escaped(plain) + "".join(code_span(code) + _escaped(after) for code, after in spans)


def code_span(text: str) -> str:
    """Text as code in a line."""
    text = printable(text, one_line=True)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def python_text(text: str) -> str:
    """Text as a literal in a block of Python code."""
    return printable(json.dumps(text, ensure_ascii=False)).replace("<", r"\x3c")


def _escaped(text: str) -> str:
    return "<br>".join(_MARKUP.sub(r"\\\g<0>", line) for line in _html(printable(text)).split("\n"))


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
