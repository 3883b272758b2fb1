"""Seconds and memory by phase: of a PPO update, or of a Trainer's training and evaluation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch

from align.engine.faults import during


class Clock:
    """Sums seconds by phase, and keeps the most memory. What is in a nested phase counts for that phase only.

    Memory is torch's peak allocation on a GPU; on a CPU, which has no such counter, the resident size of the process at the
    phase's end, or when it is asked for.
    """

    def __init__(self, device: torch.device | None = None):
        self.gpu = device if device is not None and device.type == "cuda" else None
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.process = psutil.Process()
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
            phase = self.running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
            self.bytes[phase] = max(self.bytes.get(phase, 0), self._memory())
        self.since = now

    def _memory(self) -> int:
        if self.gpu is None:
            return int(self.process.memory_info().rss)
        most = torch.cuda.max_memory_allocated(self.gpu)
        torch.cuda.reset_peak_memory_stats(self.gpu)
        return most

    def take_bytes(self) -> dict[str, int]:
        """The most memory by phase since the last call, also of a phase that still runs."""
        self._charge()
        taken, self.bytes = self.bytes, {}
        return taken

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, which start again from 0."""
        taken, self.seconds = self.seconds, {}
        return taken
