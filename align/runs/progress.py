"""The progress display of a stage, on stderr: steps done, time left, a few key numbers."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from align.terminal import printable

SECONDS_PER_LINE = 10.0


class _TimeLeft(ProgressColumn):
    """Time left. rich's own column uses the last 30 seconds only, which may be less than one step."""

    def __init__(self, display: Display):
        super().__init__()
        self._display = display

    def render(self, task: Task) -> Text:
        return Text(f"{self._display.time_left()} left", style="progress.remaining")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Says nothing more, as in `align ppo ... 2>&1 | head`; rich would end the run."""
        self.quiet = True


class Display:
    """A live bar on a terminal; elsewhere a plain line at the first step, the last, and every ten seconds or so."""

    def __init__(self, stage: str, total: int):
        self._stage, self._total = stage, total
        self._console = _Console(stderr=True, highlight=False, emoji=False)
        self._bar: Progress | None = None
        self._step = self._first_step = 0
        self._began = self._updated = time.monotonic()
        self._printed: tuple[int, float] | None = None  # step and time of the last plain line

    def start(self, step: int) -> None:
        self._step = self._first_step = step
        self._began = self._updated = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                _TimeLeft(self),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._console,
                redirect_stdout=sys.stdout.isatty(),  # otherwise `> file` would appear on the terminal
            )
            self._bar.add_task(self._stage, total=self._total, completed=step, numbers="")
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, fields: Mapping[str, float | str]) -> None:
        now = self._updated = time.monotonic()
        self._step = step
        if step <= self._first_step:  # nothing done yet: the clock starts here, not at the loading of models
            self._began = now
        numbers = "  ".join(
            f"{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in fields.items()
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=printable(numbers, one_line=True))
            return
        last_step, last_time = self._printed or (-1, -math.inf)
        if now - last_time >= SECONDS_PER_LINE or (step >= self._total and step != last_step):
            self.say(
                "  ".join(filter(None, [f"{self._stage} {step}/{self._total}", f"{self.time_left()} left", numbers]))
            )
            self._printed = step, now

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a closed pipe, a log file on a full disk: no reason to stop a run
            self._console.print(printable(text), markup=False, soft_wrap=True)

    def time_left(self) -> str:
        """h:mm:ss at the mean pace of this process; steps before a resume do not count."""
        done = self._step - self._first_step
        if self._step >= self._total:
            return "0:00:00"
        if done <= 0:
            return "-:--:--"
        pace = (self._updated - self._began) / done
        left = pace * (self._total - self._step) - (time.monotonic() - self._updated)
        return str(timedelta(seconds=round(max(left, 0.0))))
