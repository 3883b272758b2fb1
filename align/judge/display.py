"""The progress display of `align judge-reward`, which has several parts."""

from __future__ import annotations

from align.engine.distributed import World
from align.runs.progress import Display


class PartsDisplay:
    """Progress of the current part; counted on every rank, shown by rank 0.

    Args:
        parts: number of parts.
    """

    def __init__(self, world: World, parts: int):
        self.world, self.parts = world, parts
        self.number = self.done = self.total = 0
        self.display: Display | None = None

    def start(self, name: str, total: int) -> None:
        """Start a part with `total` responses to score or to sample."""
        self.stop()
        self.number, self.done, self.total = self.number + 1, 0, total
        if self.world.is_main:
            self.display = Display(f"judge-reward {self.number}/{self.parts}, {name}", total)
            self.display.start(0)
            self.display.update(0, {})

    def add(self, count: int) -> None:
        """Count `count` more responses of this rank, and as many of every other rank."""
        self.done = min(self.done + count * self.world.size, self.total)
        if self.display is not None:
            self.display.update(self.done, {})

    def stop(self) -> None:
        """End the display."""
        if self.display is not None:
            self.display.stop()
            self.display = None
