"""How long a template may take and how much it may make: estimates of what an operation would make, and the sum of a render.

Nothing can interrupt a single operation of Python such as `10 ** 10 ** 10`, so none that could take long is begun: what an
operation would make is estimated from what goes in, and refused if that is too large. Between operations, which are
then short, the clock is read and what the render has made is summed up.
"""

from __future__ import annotations

import re
from time import monotonic
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.utils import Namespace

from align.compat.others import namespace_values

MAX_SECONDS = 5.0  # of a render; an ordinary one takes less than a millisecond
MAX_SIZE = 2**26  # characters of a value; a long book has 2**21
MAX_TOTAL = 2**30  # characters that a render makes; one that rebuilds a dialogue of 1000 long turns makes 2**29
MAX_BITS = 10_000  # of an integer; Python prints no longer ones
MAX_WIDTH = 99_999  # that a format pads to
MAX_INDENT = 64
MAX_TEMPLATE = 2**20  # characters of a template; the longest of public models have 2**15

_SEARCH = 2**30  # characters that a search from the right compares, at worst the text's times the pattern's: a second
# Filters that may compare each character with each, and the most characters that take seconds then.
QUADRATIC = {"striptags": 2**20, "urlize": 2**17, "wordwrap": 2**17}
SMALL = 10_000  # characters of a text that is not summed up before it is printed or put into a list
STEP = ITEM = 64  # characters for which a round of a loop, a call or an item of a list counts; it takes as many bytes
VALUES = (str, bytes, int, float)
_MANY = MAX_SIZE // ITEM  # items
FLAT = (str, bytes, range)
CONTAINERS = (list, tuple, dict, set, frozenset, Namespace)
# Other methods and filters with arguments may make more than goes in, or look at it longer.
_LINEAR_METHODS = {"count", "encode", "endswith", "find", "index", "partition", "removeprefix", "removesuffix", "split"}
_LINEAR_METHODS |= {"splitlines", "startswith"}
_FROM_THE_RIGHT = {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"}
_WIDE_PERCENT = re.compile(r"%(\([^()]*\))?[#0\- +]*(\*|\d{6}|\d*\.(\*|\d{6}))")
_WIDE_FORMAT = re.compile(r"\{[^{}]*(:[^{}]*\d{6}|\{)")  # also a width that is an argument


class TemplateLimit(TemplateError):
    """A template takes too long, or makes too much."""


class _Meter:
    """What is left of the render that runs. Renders in other threads share it: each that begins fills it up."""

    __slots__ = ("deadline", "left")
    deadline: float
    left: float


meter = _Meter()


def begin_render() -> None:
    """Start the clock and the sum of a render, or of the compilation of a template."""
    meter.left, meter.deadline = MAX_TOTAL, monotonic() + MAX_SECONDS


def count(amount: int) -> None:
    meter.left -= amount
    if meter.left < 0:
        raise TemplateLimit(f"makes more than {MAX_TOTAL:,} characters in all")
    if monotonic() > meter.deadline:
        raise TemplateLimit(f"takes longer than {MAX_SECONDS:g} seconds")


def size_of(value: Any, indent: int = 0) -> int:
    """Characters of a value with all that is in it, each as often as it is printed, with so wide an indent."""
    if isinstance(value, FLAT):
        return len(value)
    if not isinstance(value, CONTAINERS):
        return 1
    size, inside = 0, [(value, 1)]
    while inside and size <= MAX_SIZE:
        container, depth = inside.pop()
        if isinstance(container, Namespace):
            container = namespace_values(container)  # which its text shows
        size += (1 + len(container)) * (ITEM + indent * depth)
        for item in (*container, *container.values()) if isinstance(container, dict) else container:
            if isinstance(item, FLAT):
                size += len(item)
            elif isinstance(item, CONTAINERS):
                inside.append((item, depth + 1))
    return size


def refuse_larger(size: int, what: str) -> None:
    if size > MAX_SIZE:
        raise TemplateLimit(f"{what} makes more than {MAX_SIZE:,} characters")


def made(value: Any, what: str) -> Any:
    """`value`, which `what` made, summed up."""
    kind = type(value)
    if (kind is str and len(value) < SMALL) or kind is bool or value is None:
        return value
    if kind is int:
        if value.bit_length() > MAX_BITS:
            raise TemplateLimit(f"{what} makes an integer of more than {MAX_BITS:,} bits")
        return value
    refuse_larger(size := size_of(value), what)
    if size >= SMALL:
        count(size)
    return value


def check_call(what: str, first: Any, others: list[Any]) -> None:
    """Refuse a method or filter that may make too much: at most each character replaced by the longest argument."""
    widths = [abs(each) for each in others if isinstance(each, int)]
    width, longest = (
        max(widths, default=0),
        max([size_of(each) for each in others if not isinstance(each, int)], default=0),
    )
    if what in ("round", "to_bytes") and width > MAX_BITS:
        raise TemplateLimit(f"{what} makes a number of more than {MAX_BITS:,} digits")
    if what == "tojson" and max(width, longest) > MAX_INDENT:
        raise TemplateLimit(f"tojson indents by more than {MAX_INDENT}")
    if what in ("indent", "expandtabs"):
        longest = max(width, longest)
    size = size_of(first, width if what == "tojson" else 0)
    if what == "sum" and any(isinstance(each, CONTAINERS) for each in others):
        longest = size  # each list is added by copying those before it
    if size > QUADRATIC.get(what, MAX_SIZE):
        raise TemplateLimit(f"{what} takes too long on {size:,} characters")
    refuse_larger(size * (1 + longest) + width, what)


def check_percent(text: str, values: Any) -> None:
    if _WIDE_PERCENT.search(text):
        raise TemplateLimit(f"% pads to more than {MAX_WIDTH:,} characters, or to a width that is not written out")
    refuse_larger(len(text) + text.count("%") * (size_of(values) + MAX_WIDTH * (len(text) > SMALL)), "%")


def check_method(name: str, owner: Any, arguments: list[Any]) -> None:
    if name in ("format", "format_map") and isinstance(owner, str):
        if _WIDE_FORMAT.search(owner):
            raise TemplateLimit(
                f"{name} pads to more than {MAX_WIDTH:,} characters, or to a width that is not written out"
            )
        refuse_larger(len(owner) + owner.count("{") * (size_of(arguments) + MAX_WIDTH * (len(owner) > SMALL)), name)
    elif name in _FROM_THE_RIGHT:
        if any(len(owner) * len(each) > _SEARCH for each in arguments if isinstance(each, str | bytes)):
            raise TemplateLimit(f"{name} takes too long on {len(owner):,} characters")
    elif name in ("split", "splitlines") and len(owner) > _MANY:
        separator = arguments[0] if arguments and isinstance(arguments[0], str | bytes) else None
        refuse_larger(ITEM * (owner.count(separator) if separator else len(owner) // 2), name)
    elif arguments and name not in _LINEAR_METHODS:
        check_call(name, owner, arguments)
