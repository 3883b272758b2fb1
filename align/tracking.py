"""What a run shows and writes down: metrics.jsonl and samples.jsonl always, Weights & Biases when asked, progress.

The only importer of wandb. Every metric name and its meaning is in `metrics.md` beside this file. Only rank 0
writes or shows anything, so that stages may call a `Tracker` on every rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import sys
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoint import mark_complete, write_json
from align.config import MLMRecipe, SFTRecipe, StageRecipe, TrainerRecipe, UserError
from align.progress import Display

if TYPE_CHECKING:
    from transformers import TrainerCallback

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
WANDB_RUN = "wandb_run.json"

# W&B drops or overwrites rows whose row number it has seen. Each process that works on a run numbers its rows
# from its own million on, so that a resumed run never collides, nor do its offline pieces when they are synced.
ROWS_PER_PROCESS = 1_000_000

QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_LOGS": "-all",  # errors only
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
NOISY_LOGGERS = ("transformers", "trl", "accelerate", "datasets", "evaluate", "peft", "huggingface_hub")


def quiet() -> None:
    """Silence the chatter of other libraries; their errors still come through.

    Best called before they are imported, since some speak while they are. Whoever wants to hear one sets its own
    switch in the environment (`TRANSFORMERS_VERBOSITY=info`) or Python's (`-W default`), which are left alone.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its level and handler when it is imported; a filter put here before stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    # What is imported already has read its environment.
    if (transformers_logging := sys.modules.get("transformers.utils.logging")) is not None:
        transformers_logging.disable_progress_bar()
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class Tracker:
    """The record of one stage's run, a context manager around its loop.

    On resume, lines of `metrics.jsonl` and `samples.jsonl` after `resume_step` are dropped: those steps are done
    again. With `resume_step` 0 nothing is resumed and both start empty.
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
        """Write numbers measured after `step` optimiser steps (PPO: updates). NaN and infinity become null in the file."""
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
    """Keep the lines of `path` up to `step`, atomically; a last line that a kill cut short goes too."""
    if not path.is_file():
        return
    kept = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                if step > 0 and json.loads(line)["step"] <= step:
                    kept.append(line)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def trainer_callback(tracker: Tracker, recipe: TrainerRecipe) -> TrainerCallback:
    """A callback for TRL's trainers: their logs under our names, progress, whole checkpoints, a stop at NaN.

    The trainer must leave rotation to us (`save_total_limit=None`), and its own printing must be taken out
    (`trainer.remove_callback(PrinterCallback)` with `disable_tqdm=True`).

    Raises:
        UserError: in the training loop, when the loss or gradient norm is NaN or infinite, before a save.
    """
    from accelerate import PartialState
    from transformers import TrainerCallback

    from align.stage import layout

    class StageCallback(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.shown: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            args.logging_nan_inf_filter = False  # it would put the mean of earlier losses in the place of NaN

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tracker.progress(state.global_step, **self.shown)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tracker.progress(state.global_step, **self.shown)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Logging comes before saving, so no checkpoint is declared whole before its loss was looked at.
            control.should_log |= control.should_save or control.should_training_stop

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(float(logs.get(name, 0.0))):
                    raise UserError(
                        f"{recipe.output_dir}: {name} is {logs[name]} at step {state.global_step}: expected a finite "
                        f"number. Lower learning_rate (now {recipe.learning_rate:g}), lengthen warmup_steps, look for "
                        "odd rows with `align check`, or compare bf16 true and false; then delete the folder and start again."
                    )
            metrics = trainer_metrics(logs, perplexity=isinstance(recipe, SFTRecipe | MLMRecipe))
            if metrics:
                tracker.log(state.global_step, metrics)
            keys = ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "eval/forgetting")
            self.shown |= {key.removeprefix("train/"): metrics[key] for key in keys if key in metrics}

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            processes = PartialState()
            processes.wait_for_everyone()  # each rank writes its own share of the checkpoint
            if tracker.is_main:
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                told = {"step": state.global_step, "layout": layout(recipe, processes.num_processes)}
                if recipe.load_best_model_at_end and state.best_model_checkpoint:
                    told["best_checkpoint"] = Path(state.best_model_checkpoint).name
                mark_complete(checkpoint, told, recipe.save_total_limit)

    return StageCallback()


def trainer_metrics(logs: Mapping[str, float], perplexity: bool) -> dict[str, float]:
    """Numbers that TRL logs, under the names of `metrics.md`; timings and the closing summary are left out."""
    if "train_runtime" in logs:
        return {}
    metrics = {}
    for name, value in logs.items():
        if name == "total_flos" or name == "eval_num_tokens" or name.endswith(("_runtime", "_per_second")):
            continue
        metrics[f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"] = float(value)
    if perplexity and "eval/loss" in metrics:
        metrics["eval/perplexity"] = math.exp(min(metrics["eval/loss"], 700.0))  # e^710 is beyond a float
    return metrics


def documented_metrics() -> set[str]:
    """Names in `metrics.md`; `<source>`, `<task>` and `<metric>` in a name stand for any text."""
    text = Path(__file__).with_name("metrics.md").read_text(encoding="utf-8")
    return {
        name for row in re.findall(r"^\|([^|]*)\|", text, flags=re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of `names` that `metrics.md` does not explain."""
    patterns = [re.sub("<[a-z]+>", ".+", re.escape(name)) for name in documented_metrics()]
    return [name for name in names if not re.fullmatch("|".join(patterns), name)]
