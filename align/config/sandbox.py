"""Jinja templates come from files: they are rendered in Jinja's sandbox, by another process (`align.config.sandbox_process`).

That process can be ended at any time, which no operation of Python in this one can, and has a limit on its memory.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe

from align.config import sandbox_process
from align.config.sandbox_process import LIMIT, TEXT, Limits

LIMITS = Limits()


class TemplateProblem(Exception):
    """Why a template cannot be rendered; `kind` is one of those of `align.config.sandbox_process` other than TEXT."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def render(template: str, variables: Mapping[str, Any], compiler: str | None = None) -> str:
    """The text that a template makes of variables: plain values, and lists and dicts of such.

    Args:
        compiler: Python source that defines `compile_template`; by default, templates are those of recipes.

    Raises:
        TemplateProblem: it is no template, fails on the variables, or goes over a limit.
    """
    return _answer((compiler, template), dict(variables))


def check(template: str, compiler: str | None = None) -> None:
    """Compile a template. Raises as `render`."""
    _answer((compiler, template), None)


def _answer(source: tuple[str | None, str], variables: dict[str, Any] | None) -> str:
    global _process
    with _lock:
        if _process is None:
            _process = _Process()
        try:
            kind, text = _process.answer(source, variables)
        except BaseException:  # also an interruption, after which the reply to come would be taken for another's
            end_process()
            raise
        if kind == TEXT:
            return text
    raise TemplateProblem(kind, text)


class _Process:
    def __init__(self) -> None:
        # Isolated from the current folder and from PYTHONPATH, but with the Jinja of this process.
        paths = [os.path.dirname(os.path.dirname(str(module.__file__))) for module in (jinja2, markupsafe)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", sandbox_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        pickle.dump((paths, tuple(LIMITS)), self.requests)
        self.numbers: dict[tuple[str | None, str], int] = {}  # of the templates that it has got

    def answer(self, source: tuple[str | None, str], variables: dict[str, Any] | None) -> tuple[str, str]:
        new = None if source in self.numbers else source
        number = self.numbers.setdefault(source, len(self.numbers))
        request = pickle.dumps((number, new, variables), protocol=pickle.HIGHEST_PROTOCOL)
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the missing reply shows
            self.requests.write(len(request).to_bytes(8, "little"))
            self.requests.write(request)
            self.requests.flush()
        header = self.replies.read(8)
        if len(header) == 8:
            reply = self.replies.read(int.from_bytes(header, "little"))
            kind, _, text = reply.decode("utf-8", "surrogatepass").partition("\0")
            return kind, text
        code = self.process.wait()
        end_process()
        if code == -signal.SIGPROF:
            return LIMIT, f"takes longer than {LIMITS.seconds:g} seconds"
        return LIMIT, f"ends the process that renders it ({signal.Signals(-code).name if code < 0 else code})"


_process: _Process | None = None
_lock = threading.Lock()


@atexit.register
def end_process() -> None:
    """End the process that renders, if there is one; the next render starts another."""
    global _process
    if _process is None:
        return
    process, _process = _process.process, None
    process.kill()
    process.wait()
    _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what could not be written any more
            pipe.close()  # type: ignore[union-attr]  # both are pipes


def _forget_process() -> None:
    """In a fork: the process belongs to the parent, and ends when all copies of its pipe are closed."""
    global _process, _lock
    _lock = threading.Lock()
    if _process is not None:
        process, _process = _process.process, None
        process.returncode = 0  # that of a child of the parent, which is not waited for here
        _close(process)


os.register_at_fork(after_in_child=_forget_process)
