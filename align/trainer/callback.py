"""Trainer events to the tracker and to whole checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.base import TrainerRecipe
from align.config.encoders import MLMRecipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.maths.perplexity import perplexity
from align.runs.checkpoint import mark_complete
from align.runs.tracker import Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback


def trainer_callback(tracker: Tracker, recipe: TrainerRecipe) -> TrainerCallback:
    """A callback for TRL's trainers: their logs under our names, progress, whole checkpoints, a stop at NaN.

    The trainer must leave rotation to us (`save_total_limit=None`), and its own printing must be taken out
    (`trainer.remove_callback(PrinterCallback)` with `disable_tqdm=True`).

    Raises:
        UserError: in the training loop, when the loss or gradient norm is NaN or infinite, before a save.
    """
    from accelerate import PartialState
    from transformers import TrainerCallback

    from align.runs.stage import layout

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
            metrics = trainer_metrics(logs, with_perplexity=isinstance(recipe, SFTRecipe | MLMRecipe))
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


def trainer_metrics(logs: Mapping[str, float], with_perplexity: bool) -> dict[str, float]:
    """Numbers that TRL logs, under the names of `metrics.md`; timings and the closing summary are left out."""
    if "train_runtime" in logs:
        return {}
    metrics = {}
    for name, value in logs.items():
        if name == "total_flos" or name == "eval_num_tokens" or name.endswith(("_runtime", "_per_second")):
            continue
        metrics[f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"] = float(value)
    if with_perplexity and "eval/loss" in metrics:
        metrics["eval/perplexity"] = perplexity(metrics["eval/loss"])
    return metrics
