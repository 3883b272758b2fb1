"""The progress of `align judge-reward`: a display for each part of the work, with the time that is left of it."""

from __future__ import annotations

from align.engine.distributed import World
from align.runs.progress import Display


class Work:
    """What is done of the present part, on every rank; rank 0 shows it.

    Args:
        parts: how many there will be.
    """

    def __init__(self, world: World, parts: int):
        self.world, self.parts = world, parts
        self.number = self.done = self.total = 0
        self.display: Display | None = None

    def start(self, name: str, total: int) -> None:
        """Begin a part of `total` responses to score or to sample."""
        self.stop()
        self.number, self.done, self.total = self.number + 1, 0, total
        if self.world.is_main:
            self.display = Display(f"judge-reward {self.number}/{self.parts}, {name}", total)
            self.display.start(0)
            self.display.update(0, {})

    def add(self, count: int) -> None:
        """This rank is done with `count` more responses; the others are taken to be as far."""
        self.done = min(self.done + count * self.world.size, self.total)
        if self.display is not None:
            self.display.update(self.done, {})

    def stop(self) -> None:
        """End the display."""
        if self.display is not None:
            self.display.stop()
            self.display = None
