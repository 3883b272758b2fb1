"""The program that renders templates, in a process of its own: `align.config.sandbox` starts it and talks to it.

Whatever a template does, this process alone is slow, or ends: the system's clock ends it when it has used its CPU time,
even in the midst of a single operation of Python such as `10 ** 10 ** 10`, and its memory is limited by the system. So
templates run in Jinja's own sandbox, unchanged, and render what they render elsewhere.

Of this package it needs nothing, and of others only Jinja, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import functools
import json
import pickle
import resource
import signal
import sys
import time
from typing import Any, NamedTuple

MAX_TEXT = 2**26  # characters that a template makes; a long book has 2**21
# The kinds of answers; all but the first say what is wrong.
TEXT, SYNTAX, LIMIT, FAILED = "text", "syntax", "limit", "failed"
UNDEFINED, SECURITY, REJECTED, NULL = "undefined", "security", "rejected", "null"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Limits(NamedTuple):
    """Seconds of CPU time, and bytes, of a render and of all together.

    A render may take `seconds`. It uses them up, and each next one adds `per_render` and `per_byte` of its values again,
    up to `seconds`: so many renders take on average no longer than that.
    """

    seconds: float = 10.0
    per_render: float = 0.05  # an ordinary one takes less than a thousandth
    per_byte: float = 4e-5  # Gemma 4's template goes through all turns for each turn: 3 seconds for 1000 turns
    memory: int = 2**31


class NullPrinted(Exception):
    """A template of a recipe prints a null."""


def recipe_environment() -> Any:
    """The Jinja environment of the templates of rows in recipes."""
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printed,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's escapes for HTML
    # Every process renders the rows for itself, and they must come out alike.
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


def _printed(value: Any) -> Any:
    if value is None:  # Jinja would print None
        raise NullPrinted("prints a column that is null")
    return value


@functools.cache
def _compiler(source: str | None) -> Any:
    """A function from the text of a template to the template."""
    if source is None:
        return recipe_environment().from_string
    names: dict[str, Any] = {}
    exec(source, names)
    return names["compile_template"]


_sources: dict[int, tuple[str | None, str]] = {}  # compiler and text of each template


@functools.cache
def _compiled(number: int) -> Any:
    compiler, text = _sources[number]
    return _compiler(compiler)(text)


def answer(request: bytes) -> tuple[str, str]:
    """The answer to a request, as (kind, text).

    A request is the pickle of (number of a template, its compiler and text if they are new, variables). Without
    variables the template is compiled only.
    """
    from jinja2 import exceptions

    try:
        number, source, variables = pickle.loads(request)
        _sources.setdefault(number, source)
        try:
            template = _compiled(number)
        except exceptions.TemplateSyntaxError as error:
            lines = _sources[number][1].splitlines()
            line = lines[error.lineno - 1].strip()[:200] if 0 < error.lineno <= len(lines) else ""
            return SYNTAX, f"not a Jinja template: {error.message}, in its line {error.lineno}: {line}"
        except (RecursionError, MemoryError, SyntaxError) as error:
            return SYNTAX, f"nested too deeply or too large for a template ({type(error).__name__})"
        except Exception as error:  # of Jinja's parser, such as a number of 5000 digits, and of Python's compiler
            return SYNTAX, f"not a Jinja template: {_named(error)}"
        made = "" if variables is None else template.render(variables)
        if len(made) > MAX_TEXT:
            return LIMIT, f"makes a text of more than {MAX_TEXT:,} characters"
        return TEXT, made
    except MemoryError:
        return LIMIT, f"needs more than {resource.getrlimit(resource.RLIMIT_AS)[0] / 2**30:.2g} GiB of memory"
    except NullPrinted as error:
        return NULL, str(error)
    except exceptions.UndefinedError as error:
        return UNDEFINED, _first_part(error)
    except exceptions.SecurityError as error:
        return SECURITY, _first_part(error)
    except exceptions.TemplateError as error:
        return REJECTED, _first_part(error)
    except Exception as error:  # a template may fail in any way on the values
        return FAILED, _named(error)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_part(error)}"


def _first_part(error: Exception) -> str:
    return str(error)[:1000]


def main() -> None:
    for number in _ENDING:  # what ends the run ends this by closing its input
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    paths, limits = pickle.load(requests)
    limits = Limits(*limits)
    sys.path += paths
    import jinja2.sandbox  # noqa: F401  # before the clock starts

    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = limits.memory if most == resource.RLIM_INFINITY else min(limits.memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    left, count, begun = limits.seconds, 0, time.process_time()
    while header := requests.read(8):
        request = requests.read(int.from_bytes(header, "little"))
        # Its signal, which nothing handles, ends the process. It stands still while the process waits.
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)
        before = time.process_time()
        kind, text = answer(request)
        now, count = time.process_time(), count + 1
        left = min(limits.seconds, left + limits.per_render + limits.per_byte * len(request)) - (now - before)
        if left < 0:
            kind, text = LIMIT, f"takes too long: {(now - begun) / count:.2g} seconds for each of {count:,} rows"
        reply = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


if __name__ == "__main__":
    main()
