"""Exact evaluation, training and saving for the stages that run a Hugging Face Trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from align.compat.peft import merge_and_unload
from align.compat.transformers import stop_sharded_loading, unlogged_loss
from align.compat.trl import pending_metrics, raise_token_count
from align.config.base import TrainerRecipe
from align.data.batches import ResumableLengthGroupedSampler
from align.engine.distributed import World
from align.engine.faults import during
from align.engine.sequence_parallel import SequenceGroup
from align.engine.stopping import stops_between_steps
from align.engine.timer import Clock
from align.models.bottleneck import complete_adapter, continue_adapter
from align.models.inspect_folder import CONFIG
from align.models.saved_dtype import set_saved_dtype
from align.models.trainable import MERGEABLE
from align.runs.own_files import new_files, new_files_in
from align.runs.tracker import Tracker
from align.terminal import say
from align.trainer.callback import StageCallback
from align.trainer.checkpoint import SafeCheckpoints, check_trainer_state
from reward_models.heads import hf_model


class ExactEvaluation(SafeCheckpoints):
    """A mixin that evaluates exactly: sums over all rows and ranks, divided by their count.

    TRL averages the means of batches, which depends on how rows are batched. A trainer that mixes this in adds
    [loss, correct, count] of every evaluation batch to `sums` in its `compute_loss`.
    """

    model: nn.Module
    accuracy: str  # the name under which TRL logs it
    sums: Tensor
    sums_shape: tuple[int, ...] = (3,)
    train_sums: Tensor = torch.zeros(0)  # since the last log, where a trainer keeps any beside TRL's metrics
    sequence: SequenceGroup | None = None  # the processes that share rows with this one, if any

    @cached_property
    def clock(self) -> Clock:
        """Of the phases `training` and `evaluation`."""
        return Clock(self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.sums = torch.zeros(self.sums_shape, dtype=torch.float64, device=self.args.device)
        with self.clock.phase("evaluation"):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.world().any_rank(not math.isfinite(unlogged_loss(self)[1])):
            self.log({"loss": math.nan})  # which ends the run: nothing is saved before its loss has been checked
        with during("checkpoint", Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            self.add_exact_metrics(logs)
        super().log(logs, start_time)

    def add_exact_metrics(self, logs: dict[str, float]) -> None:
        """Put the exact metrics into the log of an evaluation. Every rank must call it."""
        loss, correct, count = self.accelerator.reduce(self.sums, "sum").tolist()
        logs["eval_loss"] = loss / count
        pending_metrics(self, "eval")[self.accuracy] = [correct / count]

    def early_stopping_callback(self, patience: int) -> TrainerCallback:
        """The callback that stops training after `patience` evaluations without improvement."""
        return EarlyStoppingCallback(patience)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A resumed TRL trainer would count tokens from 0.
        counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        raise_token_count(self, max(counts, default=0))
        # Resumed from the checkpoint of its last step in mid-epoch, Trainer would take one step too many.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_train_dataloader(self) -> Any:
        return self._for_group(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._for_group(super().get_eval_dataloader(eval_dataset))

    def _for_group(self, loader: Any) -> Any:
        """The loader of a process, which now gives the batches of its group."""
        if self.sequence is not None:
            share = loader.batch_sampler  # accelerate's BatchSamplerShard
            share.num_processes, share.process_index = self.sequence.count, self.sequence.index
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "random":
            return super()._get_train_sampler(train_dataset)
        groups = self.args.world_size // (self.sequence.size if self.sequence else 1)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * groups
        return self._by_length(self.train_dataset, batch)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy == "random" or "input_ids" in eval_dataset.column_names:
            return super()._get_eval_sampler(eval_dataset)
        return self._by_length(eval_dataset, self.args.eval_batch_size)  # transformers' knows no pairs

    def _by_length(self, rows: Any, batch: int) -> ResumableLengthGroupedSampler:
        column = next(name for name in ("input_ids", "chosen_ids") if name in rows.column_names)
        return ResumableLengthGroupedSampler([len(ids) for ids in rows[column]], batch, self.args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: TRL would write one with every checkpoint; the stage writes its own at the end."""

    def _send_telemetry(self) -> None:
        """Does nothing: a training run sends no telemetry."""


def train(
    trainer: ExactEvaluation, recipe: TrainerRecipe, tracker: Tracker, checkpoint: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Train to the end, from `checkpoint` if there is one.

    Returns:
        TRL's evaluation logs before the first step and after the last; both empty without evaluation rows.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageCallback(tracker, recipe, trainer.own_sums, trainer.clock))
    if recipe.early_stopping_patience is not None:
        trainer.add_callback(trainer.early_stopping_callback(recipe.early_stopping_patience))
    if checkpoint is not None:
        check_trainer_state(checkpoint)
    with trainer.clock.phase("training"), stops_between_steps():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.eval_dataset is None:
        return {}, {}
    if untrained_is_best(trainer, recipe):
        before = evaluation_logs(trainer)[0]
        tracker.say(
            f"load_best_model_at_end: no evaluation was better than the one before training, {recipe.metric_for_best_model} "
            f"{before[_metric(recipe)]:.4g}, so the model that training started from is saved. Lower learning_rate, or "
            "evaluate more often (eval_steps)."
        )
        return before, before
    if recipe.load_best_model_at_end or evaluation_logs(trainer)[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    history = evaluation_logs(trainer)
    return history[0], history[-1]


def evaluation_logs(trainer: Trainer) -> list[dict[str, float]]:
    """The log entries of all evaluations of the run, including those before a resume, which checkpoints hold."""
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def untrained_is_best(trainer: Trainer, recipe: TrainerRecipe) -> bool:
    """Whether `load_best_model_at_end` chooses the model as it was before the first step.

    It does not compete with models that all forget too much (the one that forgets least is chosen then), nor in forgetting
    itself, which is relative to it, nor as virtual tokens, which are noise before the first step.
    """
    metric, history = _metric(recipe), evaluation_logs(trainer)
    if not recipe.load_best_model_at_end or metric == "eval_forgetting" or recipe.method in ("prompt", "prefix"):
        return False
    bound = getattr(recipe, "max_forgetting", None)
    trained = [each for each in history if each["step"] > 0 and (bound is None or each["eval_forgetting"] <= bound)]
    sign = 1 if trainer.args.greater_is_better else -1
    return bool(trained) and all(sign * history[0][metric] > sign * each[metric] for each in trained)


def _metric(recipe: TrainerRecipe) -> str:
    return f"eval_{recipe.metric_for_best_model.removeprefix('eval_')}"


def save_trained(trainer: Trainer, recipe: TrainerRecipe, world: World, load: Callable[[], PreTrainedModel]) -> None:
    """Write the trained model to `output_dir` as a plain Hugging Face folder. Every rank must call it.

    That is the model that training started from if `untrained_is_best`. An adapter is also saved as such, in `adapter/`; one that cannot be merged is saved in `output_dir` instead of a model.

    Args:
        load: loads the model that training started from, unsharded on the CPU, to merge adapters into; called on rank 0.
    """
    with during("model", Path(recipe.output_dir)):
        _save_trained(trainer, recipe, world, load)
    world.barrier()


def _save_trained(trainer: Trainer, recipe: TrainerRecipe, world: World, load: Callable[[], PreTrainedModel]) -> None:
    output = Path(recipe.output_dir)
    with new_files(output) if world.is_main else contextlib.nullcontext(new_files_in(output)) as fresh:
        tokenizer: Any = trainer.processing_class
        untrained = untrained_is_best(trainer, recipe)
        target = fresh / "adapter" if recipe.method in MERGEABLE else fresh
        if not untrained:
            trainer.save_model(str(target))
        stop_sharded_loading()  # otherwise rank 0 would load the next model sharded, alone
        if world.is_main and recipe.method == "bottleneck":
            _save_bottlenecks(trainer, recipe, load, untrained, fresh)
        elif world.is_main and untrained:
            tokenizer.save_pretrained(fresh)
            load().save_pretrained(fresh)
        elif world.is_main and recipe.method in MERGEABLE:
            tokenizer.save_pretrained(fresh)
            merged = merge_and_unload(PeftModel.from_pretrained(load(), str(target)))
            if merged.can_generate():  # in the trained model, the tokenizer's EOS has been added to its end tokens
                trained: Any = trainer.model
                merged.generation_config = hf_model(trained).generation_config
            merged.save_pretrained(fresh)
        if world.is_main and (fresh / CONFIG).is_file():
            dtype = set_saved_dtype(fresh, getattr(recipe, "model_name_or_path", None), recipe.save_dtype)
            say(f"{output}: weights in {dtype} (save_dtype: {recipe.save_dtype})")


def _save_bottlenecks(
    trainer: Trainer, recipe: Any, load: Callable[[], PreTrainedModel], untrained: bool, folder: Path
) -> None:
    """Complete the adapter that has been saved in `folder`; if `untrained`, save it as it was before training first."""
    model: Any = trainer.model
    if untrained:
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(folder)
        before = get_peft_model(load(), model.peft_config["default"])
        continue_adapter(before, recipe.model_name_or_path)
        before.save_pretrained(str(folder))
    complete_adapter(folder, recipe, load())
