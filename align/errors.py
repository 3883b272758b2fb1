"""Errors that a user can fix, and the hint that goes with an unknown word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend. Its message names the file, row, key or option, what was expected, and what to do."""


class BadRow(UserError):
    """This row cannot be used. The message is the reason, in words that many rows can share."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word).lower().replace("-", "_"), by_lower, n=1)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""
