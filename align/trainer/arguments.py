"""The arguments of a Hugging Face Trainer, from a recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from align.config.base import TrainerRecipe
from align.config.schedule import check_decay_steps
from align.engine.batch_plan import BatchPlan
from align.engine.deepspeed_config import trainer_deepspeed_config
from align.engine.distributed import World

LOWER_IS_BETTER = ("loss", "perplexity", "gap", "forgetting", "mse")  # endings of the names of metrics to minimize


def total_steps(recipe: TrainerRecipe, rows: int, plan: BatchPlan) -> int:
    """Optimizer steps of the run over `rows` training rows, including padding rows.

    Raises:
        UserError: the decay of the learning rate's schedule is longer.
    """
    steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * (rows // plan.batch_size))
    check_decay_steps(recipe, steps)
    return steps


def eval_batch_size(recipe: TrainerRecipe, rows: int, processes: int) -> int:
    """Evaluation rows per process (or group of processes) and forward pass: at most this one's share of the rows."""
    return max(1, min(recipe.per_device_eval_batch_size, -(-rows // processes)))


def optim_args_text(arguments: Mapping[str, Any]) -> str:
    """`optim_args` as the text that transformers' arguments hold: momentum=0.9,nesterov=true."""
    return ",".join(f"{name}={json.dumps(value)}" for name, value in arguments.items())


def parse_optim_args(text: str) -> dict[str, Any]:
    """What `optim_args_text` wrote."""
    pairs = (pair.partition("=") for pair in text.split(",") if pair)
    return {name: json.loads(value) for name, _, value in pairs}


def training_arguments(
    recipe: TrainerRecipe, plan: BatchPlan, world: World, evaluation: Dataset | None, resuming: bool
) -> dict[str, Any]:
    """Arguments for TRL's configs. All that affect the result, or whose default has changed over versions, are explicit."""
    choosing = recipe.load_best_model_at_end or recipe.early_stopping_patience is not None
    saving = recipe.eval_steps if recipe.load_best_model_at_end else recipe.save_steps
    return {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "num_train_epochs": recipe.num_train_epochs,
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "average_tokens_across_devices": True,
        "optim": recipe.optim,
        "optim_args": optim_args_text(recipe.optim_args),
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "lr_scheduler_kwargs": dict(recipe.lr_scheduler_kwargs),
        "warmup_steps": recipe.warmup_steps,
        "max_length": None,  # rows are already tokenized, and none is too long
        "bf16": recipe.bf16,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "deepspeed": trainer_deepspeed_config(recipe.deepspeed, recipe.bf16),
        "ddp_find_unused_parameters": False,
        "use_cpu": world.device.type == "cpu",
        "dataloader_pin_memory": world.device.type != "cpu",
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "train_sampling_strategy": recipe.train_sampling_strategy,
        "per_device_eval_batch_size": eval_batch_size(recipe, len(evaluation), plan.world_size) if evaluation else 1,
        "eval_on_start": evaluation is not None and not resuming,
        "eval_strategy": "steps" if evaluation is not None and recipe.eval_steps else "no",
        "eval_steps": recipe.eval_steps,
        "save_strategy": "steps" if saving else "no",
        "save_steps": saving or 500,
        "load_best_model_at_end": recipe.load_best_model_at_end,
        "metric_for_best_model": recipe.metric_for_best_model if choosing else None,
        "greater_is_better": not recipe.metric_for_best_model.endswith(LOWER_IS_BETTER),
        "restore_callback_states_from_checkpoint": True,  # the counter of early stopping
        "save_total_limit": None,  # `align.runs.checkpoint.mark_complete` deletes old ones
        "logging_steps": recipe.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
