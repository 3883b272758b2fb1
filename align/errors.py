"""Errors that a user can fix, and the hint that goes with an unknown word."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice


class UserError(Exception):
    """An error that the user can fix. Its message names the file, row, key or option, what was expected, and what to do."""

    reported = False  # to the other ranks of the run, by `align.engine.rank_errors`
    others: Sequence[UserError] = ()  # found at the same time, of which `align check` tells too


def first_of(errors: Iterable[UserError]) -> UserError:
    """The first of some errors, which has the others with it."""
    first, *others = (each for error in errors for each in (error, *error.others))
    first.others = others
    return first


def run_all(*checks: Callable[[], object]) -> None:
    """Run all checks, of which none needs another to have passed.

    Raises:
        UserError: the first that one raised, with the others.
    """
    wrong = []
    for check in checks:
        try:
            check()
        except UserError as error:
            wrong.append(error)
    if wrong:
        raise first_of(wrong)


class OtherRun(UserError):
    """An output folder holds a run of another recipe, or of inputs that have changed since."""


class BadFile(UserError):
    """A file that a program wrote and that cannot be read back as what it should be. The message begins with its path."""


class BadRow(UserError):
    """A row that cannot be used. The message is the reason, without details of the row, so that equal reasons can be counted."""


class TemplateFailure(UserError):
    """A template that no row can be rendered with, or that takes too long; begins with the template."""


OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|std::bad_alloc|_ALLOC_FAILED", re.I
)
SHOWN = 50  # names that an error lists
SEARCHED = 10_000  # names among which the nearest is looked for, which takes a tenth of a second


def first_few(names: Collection[str]) -> str:
    """The names, separated by commas; of many, the first ones and the number of the others."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(islice(names, SHOWN)) + more


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a library says that memory, of the machine or of a GPU, has run out."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return OUT_OF_MEMORY.search(str(error)) is not None


def reason(error: BaseException) -> str:
    """The kind of an error of another library, and the first line of its message, or all if that line announces others."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].rstrip().endswith(":"):
        lines = [" ".join(str(error).split())]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or an empty string."""
    by_lower = {name.lower(): name for name in islice(known, SEARCHED)}
    found = difflib.get_close_matches(str(word).lower().replace("-", "_"), by_lower, n=1)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""
