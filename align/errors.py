"""Errors that a user can fix, and the hint that goes with an unknown word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. Its message names the file, row, key or option, what was expected, and what to do."""


class OtherRun(UserError):
    """An output folder holds a run of another recipe, or of inputs that have changed since."""


class BadFile(UserError):
    """A file that a program wrote and that cannot be read back as what it should be. The message begins with its path."""


class BadRow(UserError):
    """A row that cannot be used. The message is the reason, without details of the row, so that equal reasons can be counted."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word).lower().replace("-", "_"), by_lower, n=1)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""
