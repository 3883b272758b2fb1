"""Where the time of an update goes: seconds by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Clock:
    """Adds up seconds by phase. A phase inside another takes its time from it, so that phases sum to the whole."""

    def __init__(self, device: torch.device | None = None):
        self.gpu = device if device is not None and device.type == "cuda" else None
        self.seconds: dict[str, float] = {}
        self.running: list[str] = []
        self.since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`."""
        self._turn()
        self.running.append(name)
        try:
            yield
        finally:
            self._turn()
            self.running.pop()

    def _turn(self) -> None:
        """Give the time since the last turn to the innermost phase."""
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)  # else a phase would end when its work is queued
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] = self.seconds.get(self.running[-1], 0.0) + now - self.since
        self.since = now

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken
