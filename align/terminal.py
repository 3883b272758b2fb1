"""Text on a terminal: what data, models, recipes and file names hold is shown, never obeyed."""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters but line breaks and tabs, marks that reorder text (bidi), separators of lines, and halves of characters,
# which cannot be written at all. Letters, accents and emoji of all scripts are none of these.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_BREAKS = re.compile("[\n\t]")


def printable(text: str, one_line: bool = False) -> str:
    r"""`text` with its control characters as escapes such as `\x1b`; with `one_line`, line breaks and tabs too."""
    text = _CONTROL.sub(_escape, text)
    return _BREAKS.sub(_escape, text) if one_line else text


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line, on stderr if no file is given, at once."""
    print(printable(text, one_line=True), file=file or sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 row`, `2 rows`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
