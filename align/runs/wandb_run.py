"""A run of Weights & Biases beside `metrics.jsonl`: it may fail or hang, and training goes on.

The only importer of wandb. All calls of a run are made in a thread of its own, in their order, so that none holds up
training; W&B itself talks to a process, which may die or stop answering.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.base import StageRecipe
from align.engine.faults import during
from align.errors import UserError
from align.runs.files import write_json
from align.runs.own_files import own
from align.runs.records import read_record
from align.runs.schemas import WANDB_RUN, WANDB_RUN_RECORD

# W&B drops or overwrites rows whose row number it has seen. Each process that works on a run numbers its rows
# from its own million on, so that a resumed run never collides, nor do its offline pieces when they are synced.
ROWS_PER_PROCESS = 1_000_000
FINISH = 300.0  # seconds that the end of a run waits for what W&B has yet to write or to upload


class WandbRun:
    """One process's part of a W&B run, which a resumed run continues.

    Args:
        folder: output folder of the stage.
        say: prints a line of text.

    Raises:
        UserError: W&B cannot start.
    """

    def __init__(self, recipe: StageRecipe, stage: str, folder: Path, say: Callable[[str], None]):
        self._say = say
        self._run, self._row = _start(recipe, stage, folder)
        self._broken = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="wandb")
        self._thread.start()
        if self._run.offline:
            say(f"W&B offline; later: wandb sync --append {Path(self._run.dir).parent}")
        elif self._run.url:
            say(f"W&B: {self._run.url}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers after `step` steps."""
        self._calls.put(lambda: self._log(step, numbers))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        data = [list(row) for row in rows]

        def call() -> None:
            import wandb

            self._log(step, {name: wandb.Table(columns=list(columns), data=data)})

        self._calls.put(call)

    def chart(self, step: int, name: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """Log a chart of curves over the same steps."""
        series = [list(curve) for curve in curves.values()]

        def call() -> None:
            import wandb

            chart = wandb.plot.line_series(list(steps), series, list(curves), name, "step")
            self._log(step, {f"{name} (chart)": chart})

        self._calls.put(call)

    def page(self, step: int, name: str, html: str) -> None:
        """Log a page of HTML as it is."""

        def call() -> None:
            import wandb

            self._log(step, {name: wandb.Html(html, inject=False, data_is_not_path=True)})

        self._calls.put(call)

    def finish(self, exit_code: int) -> None:
        """End the run; gives up after `FINISH` seconds, with what there is on the disk."""
        self._calls.put(lambda: self._run.finish(exit_code=exit_code))
        self._calls.put(None)
        try:
            self._thread.join(FINISH)
        finally:  # also after Ctrl-C
            if self._thread.is_alive():
                if not self._broken:
                    self._say(
                        f"W&B is not done after {FINISH:g} s and was stopped; later: wandb sync {Path(self._run.dir).parent}"
                    )
                self._broken = True
                _kill_service()  # the hanging call then ends with an error
                self._thread.join(5)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **values}, step=self._row, commit=True)
        self._row += 1

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._broken:
            try:
                call()
            except Exception as error:
                if not self._broken:
                    self._say(
                        f"W&B has stopped ({type(error).__name__}: {error}). Training goes on; all numbers are in metrics.jsonl."
                    )
                self._broken = True
                _tear_down()


def _start(recipe: StageRecipe, stage: str, output_dir: Path) -> tuple[Any, int]:
    """The W&B run, and the number of its next row."""
    remembered = own(output_dir / WANDB_RUN)
    if "WANDB_DIR" not in os.environ:
        own(output_dir / "wandb")
    known: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "processes": 0}
    if os.path.lexists(remembered):
        known = read_record(remembered, WANDB_RUN_RECORD)
    folder = output_dir.resolve()
    files = Path(os.environ.get("WANDB_DIR") or folder)
    try:
        (files / "wandb").mkdir(parents=True, exist_ok=True)  # W&B itself would quietly write to /tmp
    except OSError as error:
        raise UserError(
            f"report_to: Weights & Biases cannot write to {files / 'wandb'} ({error.strerror}); make room for that folder, set "
            "WANDB_DIR to another one, or choose report_to: none."
        ) from error
    os.environ.setdefault("WANDB_SILENT", "true")  # nor does it ask for a key then
    import wandb

    try:
        run = wandb.init(
            id=known["id"],
            resume="allow",
            project=recipe.project,
            name=recipe.run_name or folder.name,
            group=os.environ.get("WANDB_RUN_GROUP") or folder.parent.name,
            job_type=stage,
            config={**dataclasses.asdict(recipe), "stage": stage},
            allow_val_change=True,  # a resumed run may differ in keys that do not change the result
            dir=files,
            settings=wandb.Settings(console="off"),
        )
    except Exception as error:
        _tear_down()
        raise UserError(
            f"report_to: Weights & Biases did not start ({error}). Run `wandb login` or set WANDB_API_KEY; without "
            "a network set WANDB_MODE=offline and `wandb sync` later; or choose report_to: none, metrics.jsonl "
            "holds the same numbers."
        ) from error
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    with during("records", remembered):
        write_json(remembered, {**known, "processes": known["processes"] + 1})
    return run, known["processes"] * ROWS_PER_PROCESS


def _tear_down() -> None:
    """Stop W&B, so that it does nothing at exit either: neither wait for its process nor print a traceback."""
    import wandb

    _kill_service()
    with contextlib.suppress(Exception):
        wandb.teardown()


def _kill_service() -> None:
    import psutil  # comes with deepspeed and accelerate

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()
