"""The keys that all training stages share, and their rules.

Keys carry the names of `transformers.TrainingArguments`, TRL's configs and TRL 1.12's `PPOConfig` where
one exists. Sizes that change the result (`train_batch_size`, `rollout_batch_size`, `minibatch_size`) are
global, so that a recipe gives the same result on one process and on eight; what only has to fit in memory
is per device, and gradient accumulation is derived (`align.engine.batch_plan.BatchPlan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.config.data_source import DataSource
from align.config.deepspeed_file import read_deepspeed_file
from align.config.keys import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BATCH,
    FROM_0_TO_BELOW_1,
    MAX_LENGTH,
    MINUS_1_OR_AT_LEAST_1,
    SEED,
    TOKENS,
    Where,
    check_best_metric,
    check_function_names,
    check_ranges,
    key,
    required,
)
from align.config.optimizer import check_optimizer, optim, optim_args
from align.config.recipe import Recipe
from align.config.schedule import check_schedule, lr_scheduler_kwargs, lr_scheduler_type
from align.errors import UserError

FUNCTION_KEYS = (  # each a list of `module:function`
    *("reward_funcs", "eval_reward_funcs", "judge_reward_funcs", "second_reward_funcs"),
)
DEEPSPEED_KEYS = ("deepspeed", "value_deepspeed", "reference_deepspeed", "reward_deepspeed")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecipe(Recipe):
    """Keys that all stages that train share."""

    output_dir: str = required(
        "Folder for the trained model, `stage.json`, `metrics.jsonl` and checkpoints: a new or empty one, or that of the same run."
    )
    accept_changes: list[str] = key(
        [],
        "Keys such as train_dataset, reward_funcs or model_name_or_path: what they name may have changed since the run in "
        "`output_dir` began. Also run.json, metrics.jsonl, samples.jsonl: resume though this file is lost or damaged. "
        "`stage.json` records what was accepted.",
    )
    seed: int = key(42, "Seed of data order, splits, initialization and sampling.", SEED)

    train_dataset: list[DataSource] = key(
        [], "Training rows: path, hub id, mapping with `path`/`generator`, or a list of these."
    )
    mixture_temperature: float = key(
        1.0,
        "Temperature T of the mixture of training sources: a source's share is proportional to weight x rows^(1/T), "
        "and the total number of rows does not change; 1 is by size, higher is more even (arXiv 1910.10683).",
        AT_LEAST_1,
    )
    eval_dataset: list[DataSource] = key(
        [], "Evaluation rows; without it, a seeded share of the training prompts is held out."
    )
    eval_fraction: float = key(
        0.05, "Share of the prompts held out when there is no `eval_dataset`.", FROM_0_TO_BELOW_1
    )
    max_eval_rows: int | None = key(None, "Evaluate on at most this many rows.", AT_LEAST_1)

    optim: str = optim()
    optim_args: dict[str, bool | float | str] = optim_args()
    learning_rate: float = key(2e-5, "Peak learning rate.", ABOVE_0)
    weight_decay: float = key(
        0.0,
        "Weight decay, of weights that are no bias or norm: times the learning rate off the weight in AdamW and Adafactor, added "
        "to the gradient in others.",
        AT_LEAST_0,
    )
    adam_beta1: float = key(0.9, "AdamW beta 1.", FROM_0_TO_BELOW_1)
    adam_beta2: float = key(0.999, "AdamW beta 2.", FROM_0_TO_BELOW_1)
    adam_epsilon: float = key(1e-8, "AdamW epsilon.", ABOVE_0)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this global norm; 0 switches clipping off.", AT_LEAST_0)
    lr_scheduler_type: str = lr_scheduler_type()
    lr_scheduler_kwargs: dict[str, bool | float | str] = lr_scheduler_kwargs()
    warmup_steps: float = key(0, "Warm-up in optimizer steps; a number below 1 is a share of all steps.", AT_LEAST_0)
    per_device_train_batch_size: int = key(
        8, "Maximum sequences in one forward-backward pass per device; affects memory only.", BATCH
    )

    bf16: bool = key(False, "Train in bfloat16 mixed precision with float32 master weights.")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass to save memory.")
    method: Literal["full", "freeze", "head", "lora", "dora", "qlora", "ia3", "prompt", "prefix", "bottleneck"] = key(
        "full",
        "What is trained: all weights, some layers, the head, or an adapter, which is saved both as an adapter and "
        "merged; prompt, prefix and bottleneck, which cannot be merged, as an adapter alone.",
    )
    freeze_layers: int = key(
        0,
        "With `method: freeze`: freeze this many of the first layers, and the embedding unless it is also the head (tied weights), "
        "which stays trainable.",
        AT_LEAST_0,
    )
    trainable_pattern: str | None = key(
        None,
        "With `method: freeze`: train only the parameters whose names this regular expression matches (`re.search`).",
    )
    lora_r: int = key(16, "Rank of LoRA, DoRA and QLoRA.", BATCH)
    lora_alpha: int = key(32, "LoRA alpha.", AT_LEAST_1)
    lora_target_modules: list[str] = key(
        [], "Modules with adapters (LoRA, DoRA, QLoRA, IA3); all linear layers by default."
    )
    num_virtual_tokens: int = key(
        20, "Virtual tokens that `method: prompt` or `prefix` learns and prepends to each row.", TOKENS
    )
    prefix_projection: bool = key(
        False,
        "With `method: prefix`: compute the prefix from smaller embeddings by a two-layer network while it is trained (arXiv "
        "2101.00190, section 4.3).",
    )
    encoder_hidden_size: int | None = key(
        None, "Width of the network of `prefix_projection`; by default the model's hidden size.", AT_LEAST_1
    )
    bottleneck_size: int = key(64, "Width of the adapters of `method: bottleneck`.", BATCH)
    bottleneck_placement: Literal["houlsby", "pfeiffer"] = key(
        "houlsby",
        "Where `method: bottleneck` puts an adapter in each layer: houlsby after attention and after the feed-forward (arXiv "
        "1902.00751), pfeiffer after the feed-forward alone (arXiv 2005.00247).",
    )
    deepspeed: str | None = key(None, 'DeepSpeed JSON file (see recipes/deepspeed); sizes may be "auto".')

    logging_steps: int = key(10, "Log training metrics every this many steps.", AT_LEAST_1)
    eval_steps: int | None = key(
        None, "Evaluate every this many steps (PPO: updates), and always at the end.", AT_LEAST_1
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto",
        "Data type of the trained model on the disk; auto is that of the model that training started from. Checkpoints keep "
        "all digits.",
    )
    save_steps: int | None = key(None, "Save a resumable checkpoint every this many steps (PPO: updates).", AT_LEAST_1)
    save_total_limit: int = key(2, "Checkpoints kept; older ones are deleted.", AT_LEAST_1)
    report_to: Literal["none", "wandb"] = key(
        "none", "Also log to Weights & Biases; `metrics.jsonl` is always written."
    )
    project: str = key("align", "Weights & Biases project.")
    run_name: str | None = key(None, "Weights & Biases run name; the output folder's name by default.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRecipe(StageRecipe):
    """Keys of the stages that a Trainer runs, TRL's or transformers'."""

    train_batch_size: int = key(32, "Rows per optimizer step over all devices; accumulation is derived.", BATCH)
    num_train_epochs: float = key(1.0, "Passes over the training rows.", ABOVE_0)
    max_steps: int = key(-1, "Optimizer steps; overrides `num_train_epochs` when positive.", MINUS_1_OR_AT_LEAST_1)
    max_length: int = key(1024, "Maximum tokens of prompt plus response; longer rows are bad rows.", MAX_LENGTH)
    load_best_model_at_end: bool = key(
        False,
        "Save the checkpoint with the best `metric_for_best_model` instead of the last; one is saved every eval_steps. If "
        "no evaluation is better than the one before training, that is the model that training started from.",
    )
    metric_for_best_model: str = key(
        "eval_loss",
        "Evaluation metric that selects the best model: lower is better if its name ends in loss, perplexity, gap or "
        "forgetting, otherwise higher is better.",
    )
    early_stopping_patience: int | None = key(
        None, "Stop after this many evaluations in a row without an improvement of `metric_for_best_model`.", AT_LEAST_1
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = key(
        "random", "Order of rows: random, or random among rows of similar length, which needs less padding."
    )


def check_training_rules(recipe: StageRecipe, where: Where) -> None:
    """The rules for the keys of `StageRecipe`, except `method`.

    Raises:
        UserError: names the first broken rule.
    """
    check_ranges(recipe, where)
    if not recipe.train_dataset:
        raise UserError(
            f"{where('train_dataset')}: expected a path, a hub id or a mapping, got nothing; name the training rows."
        )
    for name in DEEPSPEED_KEYS:
        if path := getattr(recipe, name, None):
            read_deepspeed_file(path, where(name))
    check_optimizer(recipe, where)
    check_schedule(recipe, where)
    for name in FUNCTION_KEYS:
        check_function_names(getattr(recipe, name, []), where(name))


def check_trainer_rules(recipe: TrainerRecipe, where: Where, metrics: Sequence[str] = ()) -> None:
    """The rules between the keys of `TrainerRecipe`.

    Args:
        metrics: names of the metrics of an evaluation, without `eval_`; empty if they are not known yet.

    Raises:
        UserError: names the first broken rule.
    """
    asked = "load_best_model_at_end" if recipe.load_best_model_at_end else "early_stopping_patience"
    if not getattr(recipe, asked):
        return
    if recipe.eval_steps is None:
        raise UserError(f"{where(asked)}: needs evaluations during training; set eval_steps")
    if not recipe.eval_dataset and recipe.eval_fraction == 0:
        raise UserError(f"{where(asked)}: needs held-out rows; set eval_dataset or eval_fraction")
    if recipe.load_best_model_at_end and recipe.save_steps not in (None, recipe.eval_steps):
        raise UserError(
            f"{where('save_steps')}: expected eval_steps ({recipe.eval_steps}) with load_best_model_at_end, so that "
            f"every evaluated model is saved, got {recipe.save_steps}"
        )
    if metrics:
        check_best_metric(recipe.metric_for_best_model, metrics, where("metric_for_best_model"))
