"""The heartbeat of a lock, for machines that flock does not reach across: the time of its file changes while a run holds it.

Clocks of machines differ, so another machine compares the file's times with one another alone, and counts by its own clock
how long they have stayed the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

PERIOD = 10.0  # seconds between beats
SILENCE = 6  # periods without a beat after which a run counts as dead


def beat(path: Path, check: Callable[[], None]) -> Callable[[], None]:
    """Renew the time of a file every `PERIOD` seconds, in a thread; returns what ends that.

    Args:
        check: called before each beat.
    """
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(PERIOD):
            check()
            with contextlib.suppress(OSError):  # of a full or unreachable disk, or the file is gone
                os.utime(path, follow_symlinks=False)

    threading.Thread(target=run, daemon=True, name="heartbeat").start()
    return stopped.set


class Pulse:
    """The heartbeat of a lock, as observed from another machine."""

    def __init__(self) -> None:
        self._first: object = None
        self._since = 0.0

    def is_new(self) -> bool:
        return self._first is None

    def observe(self, state: object, period: float) -> bool | None:
        """Whether the run is alive; None if it is too early to say.

        Args:
            state: the file's time, and what else only a living run changes.
            period: of its heartbeat, in seconds.
        """
        if self._first is None:
            self._first, self._since = state, time.monotonic()
        if state != self._first:
            return True
        return None if time.monotonic() < self._since + SILENCE * period else False
