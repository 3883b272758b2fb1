"""A limit on the time that a user's function may take, whatever it is doing."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platlib", "purelib"))
GRACE = 10.0  # seconds that a function has to react to `TimedOut`


class TimedOut(BaseException):
    """Raised inside the function: no Exception, which a function that tries again and again would catch."""


def end_process(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def time_limit(seconds: float, message: str, give_up: Callable[[str], None] = end_process) -> Iterator[None]:
    """Raise `TimedOut` in the block after `seconds`; its text is `message` with the line that was running.

    The block is interrupted by SIGALRM, as regular expressions, sleeping and sockets can be, which a thread could not do.
    Code of other languages that heeds no signal, and a thread other than the main one, cannot be interrupted: `give_up` is
    then called, in a thread, after another `GRACE` seconds. If nothing happens within those of the next, since the
    function does not let go of the interpreter's lock, the process ends with the stack of each thread.

    A function that sets an alarm of its own may do so: of these three the first is then left out.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise TimedOut(f"{message}{_place(frame)}")

    backstop = threading.Timer(seconds + GRACE, give_up, [message])
    backstop.daemon = True
    backstop.start()
    faulthandler.dump_traceback_later(seconds + 2 * GRACE, exit=True, file=2)
    try:
        with _alarm(seconds, interrupt):
            yield
    finally:
        backstop.cancel()
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _alarm(seconds: float, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler_before = signal.signal(signal.SIGALRM, handler)
    timer_before = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again, if the function caught it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer_before)
        signal.signal(signal.SIGALRM, handler_before)


def _place(frame: FrameType | None) -> str:
    """Where the user's code was: the innermost line that is not in a library."""
    places = [(each.f_code, line) for each, line in traceback.walk_stack(frame)]
    own = [(code, line) for code, line in places if not code.co_filename.startswith(LIBRARIES)]
    code, line = (own or places)[0]
    return f", in {code.co_name} ({code.co_filename}, line {line})"
