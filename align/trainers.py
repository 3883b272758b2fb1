"""What the two stages that TRL trains share: arguments, start, exact evaluation, resume, saving, model card."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.checkpoint import (
    clear_partial,
    complete_checkpoints,
    finish_stage,
    new_folder,
    read_manifest,
    tokenizer_digest,
)
from align.config import StageRecipe, TrainerRecipe, UserError
from align.evaluation import markdown_table
from align.recipes import BatchPlan
from align.tracking import Tracker, trainer_callback
from align.world import World

UNTRAINED = "untrained"  # in output_dir while the stage runs: the model it starts from, where that had to be made first


def last_checkpoint(recipe: StageRecipe, world: World) -> Path | None:
    """The newest whole checkpoint, once rank 0 has deleted what a killed run left half written."""
    if world.is_main:
        clear_partial(recipe.output_dir)
    world.barrier()
    return next(reversed(complete_checkpoints(recipe.output_dir)), None)


def step_of(checkpoint: Path | None) -> int:
    """Optimiser steps done at a checkpoint; 0 without one."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def already_finished(recipe: StageRecipe) -> dict[str, Any]:
    """Say that nothing is left to do; returns the results that the manifest holds."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{recipe.output_dir}: this stage is finished already", file=sys.stderr)
    return dict((read_manifest(recipe.output_dir) or {})["results"])


def write_untrained(recipe: StageRecipe, world: World, resuming: bool, write: Callable[[Path], None]) -> str:
    """Have rank 0 make the stage's starting model, so that all ranks, and a resumed run, start from the same one.

    Args:
        write: fills the folder that it is given.

    Returns:
        The folder, for all ranks to load from.
    """
    folder = Path(recipe.output_dir) / UNTRAINED
    if world.is_main and not (resuming and folder.is_dir()):
        with new_folder(folder) as fresh:
            write(fresh)
    world.barrier()
    return str(folder)


def check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, key: str, may_add_template: bool = True) -> None:
    """See that a stage goes on with the tokenizer and chat template that the model in `path` was trained with.

    Args:
        may_add_template: whether the recipe may give a chat template to a model that was trained without one.

    Raises:
        UserError: its manifest says otherwise, or the stage that makes it has not finished.
    """
    manifest = read_manifest(path)
    mine = tokenizer_digest(tokenizer)
    theirs = manifest["tokenizer"] if manifest else mine
    differing = [name.replace("_", " ") for name in mine if theirs[name] != mine[name]]
    if may_add_template and theirs["chat_template"] is None:
        differing = [name for name in differing if name != "chat template"]
    if differing:
        raise UserError(
            f"{key}: {path} was trained with another {' and '.join(differing)} than this recipe gives; "
            "use the same tokenizer files and chat_template_path as that stage."
        )


def check_lengths(ids: Iterable[Sequence[int]], config: PretrainedConfig) -> None:
    """See that the model has a position for every token of the rows.

    Raises:
        UserError: a row is longer than the model can read.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if limit is not None and longest > limit:
        raise UserError(
            f"max_length: the longest row has {longest} tokens, and the model reads at most {limit}; "
            f"set max_length: {limit}, and on_bad_row: skip to leave longer rows out."
        )


def total_steps(recipe: TrainerRecipe, rows: int, plan: BatchPlan) -> int:
    """Optimiser steps of the whole run over `rows` training rows, padding rows included."""
    return recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * (rows // plan.batch_size))


def eval_batch_size(recipe: TrainerRecipe, rows: int, world: World) -> int:
    """Evaluation rows per process and forward pass: no more than there are to go round."""
    return max(1, min(recipe.per_device_eval_batch_size, -(-rows // world.size)))


def training_arguments(
    recipe: TrainerRecipe, plan: BatchPlan, world: World, evaluation: Dataset | None, resuming: bool
) -> dict[str, Any]:
    """Arguments for TRL's configs. Those that change the result, or whose default has moved, are explicit."""
    return {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "num_train_epochs": recipe.num_train_epochs,
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "average_tokens_across_devices": True,
        "optim": "adamw_torch",
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_steps,
        "max_length": None,  # rows come tokenised, and none is too long
        "bf16": recipe.bf16,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "deepspeed": deepspeed_config(recipe),
        "ddp_find_unused_parameters": False,
        "use_cpu": world.device.type == "cpu",
        "dataloader_pin_memory": world.device.type != "cpu",
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "per_device_eval_batch_size": eval_batch_size(recipe, len(evaluation), world) if evaluation else 1,
        "eval_on_start": evaluation is not None and not resuming,
        "eval_strategy": "steps" if evaluation is not None and recipe.eval_steps else "no",
        "eval_steps": recipe.eval_steps,
        "save_strategy": "steps" if recipe.save_steps else "no",
        "save_steps": recipe.save_steps or 500,
        "save_total_limit": None,  # `align.checkpoint.mark_complete` deletes old ones
        "logging_steps": recipe.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def deepspeed_config(recipe: StageRecipe) -> dict[str, Any] | None:
    """The recipe's DeepSpeed file with what the recipe decides set to "auto", which transformers fills in."""
    if recipe.deepspeed is None:
        return None
    config: dict[str, Any] = json.loads(Path(recipe.deepspeed).read_text(encoding="utf-8"))
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config |= dict.fromkeys(sizes, "auto")
    config["bf16"] = {**config.get("bf16", {}), "enabled": "auto"}
    config["zero_force_ds_cpu_optimizer"] = False
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # in the dtype they have, despite the name
    return config


def lora_config(recipe: TrainerRecipe, task_type: str, trained_whole: Sequence[str] = ()) -> LoraConfig | None:
    """LoRA as the recipe asks, without dropout; None when it asks for none.

    Args:
        trained_whole: modules to train in full beside the adapters, such as a new head.
    """
    if not recipe.use_peft:
        return None
    return LoraConfig(
        task_type=task_type,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        target_modules=recipe.lora_target_modules or "all-linear",
        modules_to_save=list(trained_whole) or None,
    )


class ExactEvaluation(Trainer):  # type: ignore[misc]
    """Evaluation numbers as sums over all rows and ranks divided by their count.

    TRL averages the means of batches, which depends on how rows fall into batches. A trainer that mixes this in
    adds [loss, correct, count] of every evaluation batch to `sums` in its `compute_loss`.
    """

    accuracy: str  # TRL's name for it
    sums: Tensor
    _total_train_tokens: int

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            loss, correct, count = self.accelerator.reduce(self.sums, "sum").tolist()
            logs["eval_loss"] = loss / count
            self._metrics["eval"][self.accuracy] = [correct / count]
        super().log(logs, start_time)

    def _run_epoch(self, **kwargs: Any) -> None:
        # A resumed TRL trainer counts tokens from 0 again.
        counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = max([self._total_train_tokens, *counts])
        # Resumed from the checkpoint of its last step in the middle of an epoch, Trainer would take one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write one with every checkpoint; the stage writes its own at the end."""

    def _send_telemetry(self) -> None:
        """Nothing: a training run does not talk to anybody unasked."""


def train(
    trainer: ExactEvaluation, recipe: TrainerRecipe, tracker: Tracker, checkpoint: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Train to the end, from `checkpoint` if there is one.

    Returns:
        TRL's evaluation logs before the first step and after the last; both empty without evaluation rows.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer_callback(tracker, recipe))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.eval_dataset is None:
        return {}, {}
    if _evaluations(trainer)[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    history = _evaluations(trainer)
    return history[0], history[-1]


def _evaluations(trainer: Trainer) -> list[dict[str, float]]:
    """Evaluation logs of the whole run, of the processes before a resume too: checkpoints carry them."""
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def save_trained(trainer: Trainer, recipe: TrainerRecipe, world: World, load: Callable[[], PreTrainedModel]) -> None:
    """Write the trained model into `output_dir` as a plain Hugging Face folder, adapters merged. For all ranks.

    Args:
        load: the model that training started from, whole and on the CPU, to merge adapters into; called on rank 0.
    """
    output = Path(recipe.output_dir)
    target = output / "adapter" if recipe.use_peft else output
    trainer.save_model(str(target))
    unset_hf_deepspeed_config()  # else what is loaded next would be sharded, by one rank alone
    if world.is_main:
        (target / "training_args.bin").unlink()  # a pickle, and the manifest says the same
        if recipe.use_peft:
            PeftModel.from_pretrained(load(), str(target)).merge_and_unload().save_pretrained(output)
            shutil.rmtree(target)
    world.barrier()


def finish(
    recipe: TrainerRecipe,
    stage: str,
    inputs: Mapping[str, str | None],
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Any],
    results: Mapping[str, Any],
    card: str,
    **more: Any,
) -> None:
    """Write the README.md and then the manifest, on rank 0.

    Args:
        stage, inputs, tokenizer, data, results, more: as for `align.checkpoint.finish_stage`.
        card: Markdown that says what the model is and how to load it.
    """
    sources = [[source["source"], source["rows"], source["fingerprint"][:16]] for source in data["sources"]]
    table = markdown_table(["measure", "before", "after"], results["table"]) if results["table"] else "Not evaluated.\n"
    text = (
        f"---\nlibrary_name: transformers\ntags: [align, {stage}]\n---\n\n{card}\n"
        f"## Results\n\n{table}\n## Data\n\n{markdown_table(['source', 'rows', 'fingerprint'], sources)}\n"
        f"{data['train_rows']} rows were trained on. The recipe, seed and package versions are in `stage.json`, the "
        "metrics of the run in `metrics.jsonl`.\n"
    )
    folder = Path(recipe.output_dir)
    (folder / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(folder / UNTRAINED, ignore_errors=True)
    finish_stage(recipe, stage, inputs, tokenizer, data, results, **more)
