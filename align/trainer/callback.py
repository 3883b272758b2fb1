"""Trainer events to the tracker and to complete checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments

from align.config.base import TrainerRecipe
from align.config.encoders import MLMRecipe
from align.config.keys import check_best_metric
from align.config.sft import SFTRecipe
from align.engine.cpu import return_freed_memory
from align.engine.distributed import World
from align.engine.faults import during
from align.engine.stopping import stop, stop_asked
from align.engine.timer import Clock
from align.errors import UserError
from align.maths.perplexity import perplexity
from align.runs.checkpoint import mark_complete
from align.runs.own_files import own
from align.runs.stage import layout
from align.runs.tracker import Tracker

TIMINGS = ("_runtime", "_per_second")  # endings of names that Trainer adds
SHOWN = ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "eval/forgetting")  # beside the progress bar


class StageCallback(TrainerCallback):
    """Logs a trainer's metrics under our names, shows progress, completes checkpoints, and stops at NaN.

    The trainer must not delete checkpoints (`save_total_limit=None`) or print (`disable_tqdm=True`, and
    `trainer.remove_callback(PrinterCallback)`).

    Args:
        own_sums: given a checkpoint, size and CRC-32 of each file that this rank wrote, by its path, once on the disk.
        clock: of the phases whose memory is logged.

    Raises:
        UserError: in the training loop, if the loss or gradient norm is NaN or infinite, before a checkpoint is saved.
    """

    def __init__(
        self,
        tracker: Tracker,
        recipe: TrainerRecipe,
        own_sums: Callable[[Path], dict[str, list[int]]],
        clock: Clock,
    ) -> None:
        self.tracker, self.recipe, self.own_sums, self.clock = tracker, recipe, own_sums, clock
        self.shown: dict[str, float] = {}
        self.stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.logging_nan_inf_filter = False  # it would replace NaN by the mean of earlier losses
        return_freed_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tracker.progress(state.global_step, **self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tracker.progress(state.global_step, **self.shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stopping = stop_asked(_world())
        # Logging comes before saving, so no checkpoint is saved before its loss has been checked. A stop adds no line.
        control.should_log |= control.should_save or control.should_training_stop
        control.should_save |= self.stopping
        if control.should_save:
            if self.tracker.is_main:
                own(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            PartialState().wait_for_everyone()  # before another rank makes the folder

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise UserError(
                    f"{self.recipe.output_dir}: {name} is {logs[name]} at step {state.global_step}: expected a finite "
                    f"number. Lower learning_rate (now {self.recipe.learning_rate:g}), lengthen warmup_steps, look for "
                    "odd rows with `align check`, or compare bf16 true and false; then delete the folder and start again."
                )
        check_best(args, logs)
        metrics = trainer_metrics(logs, with_perplexity=isinstance(self.recipe, SFTRecipe | MLMRecipe))
        if metrics:
            memory = {f"memory/{phase}": size / 2**30 for phase, size in self.clock.take_bytes().items()}
            self.tracker.log(state.global_step, metrics | memory)
        self.shown |= {key.removeprefix("train/"): metrics[key] for key in SHOWN if key in metrics}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        processes = PartialState()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        progress = {"step": state.global_step, "layout": layout(self.recipe, processes.num_processes)}
        if self.recipe.load_best_model_at_end and state.best_model_checkpoint:
            progress["best_checkpoint"] = Path(state.best_model_checkpoint).name
        world = _world()
        with during("checkpoint", checkpoint):
            mark_complete(checkpoint, progress, self.recipe.save_total_limit, world, self.own_sums(checkpoint))
        if self.stopping:
            stop(checkpoint, world)


def _world() -> World:
    processes = PartialState()
    return World(processes.process_index, processes.num_processes, processes.device)


def check_best(args: TrainingArguments, logs: Mapping[str, float]) -> None:
    """Check, if `logs` are those of an evaluation, that the metric which chooses the best model is among them.

    Raises:
        UserError: it is not.
    """
    if args.metric_for_best_model is not None and "eval_loss" in logs:
        measured = [name for name in logs if name.startswith("eval_") and not name.endswith(TIMINGS)]
        check_best_metric(args.metric_for_best_model, measured, "metric_for_best_model")


def trainer_metrics(logs: Mapping[str, float], with_perplexity: bool) -> dict[str, float]:
    """A Trainer's logs under the names of `metrics.md`, without timings and the final summary."""
    if "train_runtime" in logs:
        return {}
    metrics = {}
    for name, value in logs.items():
        if name == "total_flos" or name == "eval_num_tokens" or name.endswith(TIMINGS):
            continue
        metrics[f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"] = float(value)
    if with_perplexity and "eval/loss" in metrics:
        metrics["eval/perplexity"] = perplexity(metrics["eval/loss"])
    return metrics
