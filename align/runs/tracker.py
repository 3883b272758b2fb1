"""The records of a run: metrics.jsonl and samples.jsonl, progress on the terminal, and Weights & Biases if configured.

Every metric name and its meaning is in `metrics.md` beside this file. Only rank 0
writes or shows anything, so that stages may call a `Tracker` on every rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from align.config.base import StageRecipe
from align.engine.faults import during, removed
from align.errors import UserError, reason
from align.runs.files import write_text
from align.runs.own_files import own
from align.runs.progress import Display
from align.runs.schemas import METRICS, SAMPLES, WARNINGS
from align.runs.wandb_run import WandbRun

# What makes the report of a run. It reads the records of all stages and so lies above them: found by name, as a stage is.
REPORT = "align.report.page"


class Tracker:
    """The record of one stage's run, a context manager around its loop.

    On resume, lines of `metrics.jsonl` and `samples.jsonl` after `resume_step` are dropped: those steps are done
    again. With `resume_step` 0 both start empty.
    """

    def __init__(self, recipe: StageRecipe, stage: str, total_steps: int, resume_step: int = 0):
        self.recipe, self.stage = recipe, stage
        self.resume_step = self._last_step = resume_step
        self.is_main = os.environ.get("RANK", "0") == "0"
        self._folder = Path(recipe.output_dir)
        self._display = Display(stage, total_steps)
        self._wandb: WandbRun | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> Tracker:
        """
        Raises:
            UserError: `report_to` is wandb and W&B cannot start, or the folder cannot be written.
        """
        if self.is_main:
            with during("records", self._folder):
                own(self._folder / METRICS, self._folder / SAMPLES)
                self._identity = _identity(self._folder)
                for name in (METRICS, SAMPLES):
                    _drop_after(self._folder / name, self.resume_step)
                self._warned = _kinds(self._folder / SAMPLES)
            if self.recipe.report_to == "wandb":
                self._wandb = WandbRun(self.recipe, self.stage, self._folder, self.say)
            self._display.start(self.resume_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._display.stop()
        if self._wandb is not None:
            if kind is None:
                self._log_report(self._wandb)
            self._wandb.finish(0 if kind is None else 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics after `step` optimizer steps (PPO: updates). NaN and infinity become null in the file."""
        if not self.is_main:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        written = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._last_step = step
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._append(METRICS, [{"step": step, "time": now, **written}])
        if self._wandb is not None:
            self._wandb.log(step, numbers)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table: one line of `samples.jsonl` per row, with the step and the table's name."""
        if not self.is_main:
            return
        self._append(SAMPLES, [{"step": step, "name": name, **dict(zip(columns, row, strict=True))} for row in rows])
        if self._wandb is not None:
            self._wandb.table(step, name, columns, rows)

    def chart(self, step: int, name: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """Draw curves over the same steps into one chart of W&B; nothing without it."""
        if self._wandb is not None:
            self._wandb.chart(step, name, steps, curves)

    def progress(self, step: int, **fields: float | str) -> None:
        """Show that `step` of all steps are done, with a few key numbers.

        Raises:
            UserError: the output folder was removed.
        """
        if self.is_main:
            self._check_folder()
            self._display.update(step, fields)

    def say(self, *lines: str) -> None:
        """Print lines on stderr, above the progress bar."""
        for line in lines if self.is_main else ():
            self._display.say(line)

    def _log_report(self, run: WandbRun) -> None:
        """Log the run's report, with the charts of `align report`; no run ends by it."""
        try:
            run.page(self._last_step, "report", importlib.import_module(REPORT).report_html(self._folder))
        except Exception as error:
            self.say(f"no report in W&B: {error if isinstance(error, UserError) else reason(error)}")

    def warn(self, step: int, kind: str, text: str) -> None:
        """Print a warning, and write the first of its kind to `samples.jsonl`, for `align report` and `align diagnose`."""
        self.say(text)
        if self.is_main and kind not in self._warned:
            self._warned.add(kind)
            self._append(SAMPLES, [{"step": step, "name": WARNINGS, "kind": kind, "text": text}])

    def _check_folder(self) -> None:
        # A checkpoint would make the folder anew, without the records of the run.
        if _identity(self._folder) != self._identity:
            raise removed(self._folder)

    def _append(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        path = self._folder / name
        with during("records", path), open(path, "a", encoding="utf-8") as file:
            file.write(lines)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _kinds(path: Path) -> set[str]:
    """Kinds of warnings that `path` has."""
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {str(row.get("kind")) for row in rows if row.get("name") == WARNINGS}


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of `path` up to `step`, atomically; a last line that is incomplete is dropped too."""
    if not path.is_file():
        return
    kept = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut off, or is not ours
                if step > 0 and json.loads(line)["step"] <= step:
                    kept.append(line)
    write_text(path, "".join(kept))
