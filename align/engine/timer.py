"""Seconds of an update by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from align.engine.faults import during


class Clock:
    """Sums seconds by phase. Time in a nested phase counts for that phase only, so that phases sum to the total."""

    def __init__(self, device: torch.device | None = None):
        self.gpu = device if device is not None and device.type == "cuda" else None
        self.seconds: dict[str, float] = {}
        self.running: list[str] = []
        self.since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block as `name`. When memory runs out there, the error names the phase."""
        self._charge()
        self.running.append(name)
        try:
            with during(name):
                yield
        finally:
            self._charge()
            self.running.pop()

    def _charge(self) -> None:
        """Give the time since the last call to the innermost phase."""
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)  # else a phase would end once its kernels are queued
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] = self.seconds.get(self.running[-1], 0.0) + now - self.since
        self.since = now

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, which start again from 0."""
        taken, self.seconds = self.seconds, {}
        return taken
