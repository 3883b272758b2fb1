"""What a run records and shows: metrics.jsonl and samples.jsonl always, Weights & Biases if configured, progress.

The only importer of wandb. Every metric name and its meaning is in `metrics.md` beside this file. Only rank 0
writes or shows anything, so that stages may call a `Tracker` on every rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from align.config.base import StageRecipe
from align.errors import UserError
from align.runs.files import write_json, write_text
from align.runs.progress import Display

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
WANDB_RUN = "wandb_run.json"

# W&B drops or overwrites rows whose row number it has seen. Each process that works on a run numbers its rows
# from its own million on, so that a resumed run never collides, nor do its offline pieces when they are synced.
ROWS_PER_PROCESS = 1_000_000


class Tracker:
    """The record of one stage's run, a context manager around its loop.

    On resume, lines of `metrics.jsonl` and `samples.jsonl` after `resume_step` are dropped: those steps are done
    again. With `resume_step` 0 both start empty.
    """

    def __init__(self, recipe: StageRecipe, stage: str, total_steps: int, resume_step: int = 0):
        self.recipe, self.stage = recipe, stage
        self.resume_step = resume_step
        self.is_main = os.environ.get("RANK", "0") == "0"
        self._folder = Path(recipe.output_dir)
        self._display = Display(stage, total_steps)
        self._wandb: Any = None
        self._wandb_row = 0

    def __enter__(self) -> Tracker:
        """
        Raises:
            UserError: `report_to` is wandb and W&B cannot start.
        """
        if self.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, SAMPLES):
                _drop_after(self._folder / name, self.resume_step)
            if self.recipe.report_to == "wandb":
                self._start_wandb()
            self._display.start(self.resume_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._display.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics after `step` optimizer steps (PPO: updates). NaN and infinity become null in the file."""
        if not self.is_main:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        written = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._append(METRICS, [{"step": step, "time": now, **written}])
        self._to_wandb(step, numbers)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table: one line of `samples.jsonl` per row, with the step and the table's name."""
        if not self.is_main:
            return
        self._append(SAMPLES, [{"step": step, "name": name, **dict(zip(columns, row, strict=True))} for row in rows])
        if self._wandb is not None:
            import wandb

            self._to_wandb(step, {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def chart(self, step: int, name: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """Draw curves over the same steps into one chart of W&B; nothing without it."""
        if self._wandb is not None:
            import wandb

            series = wandb.plot.line_series(
                list(steps), [list(curve) for curve in curves.values()], list(curves), name, "step"
            )
            self._to_wandb(step, {f"{name} (chart)": series})

    def progress(self, step: int, **fields: float | str) -> None:
        """Show that `step` of all steps are done, with a few key numbers."""
        if self.is_main:
            self._display.update(step, fields)

    def say(self, text: str) -> None:
        """Print text on stderr, above the progress bar."""
        if self.is_main:
            self._display.say(text)

    def _append(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with open(self._folder / name, "a", encoding="utf-8") as file:
            file.write(lines)

    def _to_wandb(self, step: int, values: Mapping[str, Any]) -> None:
        if self._wandb is not None:
            self._wandb.log({"step": step, **values}, step=self._wandb_row, commit=True)
            self._wandb_row += 1

    def _start_wandb(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # nor does it ask for a key then
        import wandb

        remembered = self._folder / WANDB_RUN
        run: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "processes": 0}
        if remembered.is_file():
            run = json.loads(remembered.read_text(encoding="utf-8"))
        folder = self._folder.resolve()
        try:
            self._wandb = wandb.init(
                id=run["id"],
                resume="allow",
                project=self.recipe.project,
                name=self.recipe.run_name or folder.name,
                group=os.environ.get("WANDB_RUN_GROUP") or folder.parent.name,
                job_type=self.stage,
                config={**dataclasses.asdict(self.recipe), "stage": self.stage},
                allow_val_change=True,  # a resumed run may differ in keys that do not change the result
                dir=os.environ.get("WANDB_DIR") or folder,
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"report_to: Weights & Biases did not start ({error}). Run `wandb login` or set WANDB_API_KEY; without "
                "a network set WANDB_MODE=offline and `wandb sync` later; or choose report_to: none, metrics.jsonl "
                "holds the same numbers."
            ) from error
        self._wandb.define_metric("step", hidden=True)
        self._wandb.define_metric("*", step_metric="step")
        self._wandb_row = run["processes"] * ROWS_PER_PROCESS
        write_json(remembered, {**run, "processes": run["processes"] + 1})
        if self._wandb.offline:
            self._display.say(f"W&B offline; later: wandb sync --append {Path(self._wandb.dir).parent}")
        elif self._wandb.url:
            self._display.say(f"W&B: {self._wandb.url}")


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of `path` up to `step`, atomically; a last line that is incomplete is dropped too."""
    if not path.is_file():
        return
    kept = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                if step > 0 and json.loads(line)["step"] <= step:
                    kept.append(line)
    write_text(path, "".join(kept))
