"""DeepSpeed's configuration of each model: the recipe's JSON files, with the sizes of this run filled in.

Roles are "policy" (also the one model of the other stages), "value", "reference" and "reward".
"""

from __future__ import annotations

from typing import Any

from align.config.base import DEEPSPEED_KEYS, StageRecipe
from align.config.deepspeed_file import read_deepspeed_file, zero_stage_of

FLOAT32_SUMS = 2  # the first ZeRO stage at which DeepSpeed accumulates gradients in float32


def uses_deepspeed(recipe: StageRecipe) -> bool:
    """Whether any model has a DeepSpeed file."""
    return any(getattr(recipe, key, None) for key in DEEPSPEED_KEYS)


def deepspeed_file(recipe: StageRecipe, role: str) -> str | None:
    """Path of the DeepSpeed file of a model: its own, or the recipe's `deepspeed`."""
    path: str | None = getattr(recipe, f"{role}_deepspeed", None) or recipe.deepspeed
    return path


def zero_stage(recipe: StageRecipe, role: str = "policy") -> int:
    """The ZeRO stage of a model; 0 without a DeepSpeed file."""
    return zero_stage_of(deepspeed_file(recipe, role))


def deepspeed_config(
    path: str | None, *, processes: int, accumulation: int, max_grad_norm: float, bf16: bool, hidden_size: int = 0
) -> dict[str, Any]:
    """A DeepSpeed file with every "auto" filled in, for `DeepSpeedEngine`; without a file, ZeRO 0.

    Args:
        accumulation: microbatches per optimizer step. Their size is set to 1: DeepSpeed only counts them.
        hidden_size: of the model, from which `automatic_sizes` come.
    """
    config = read_deepspeed_file(path) if path else {}
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = accumulation * processes
    config["gradient_clipping"] = max_grad_norm
    config["bf16"] = {**config.get("bf16", {}), "enabled": bf16}
    config.setdefault("zero_allow_untested_optimizer", True)
    config["zero_force_ds_cpu_optimizer"] = False
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if hidden_size:
        zero |= {name: size for name, size in automatic_sizes(hidden_size).items() if zero.get(name) == "auto"}
    for name in [name for name, value in zero.items() if value == "auto"]:
        del zero[name]  # DeepSpeed's own default
    config.setdefault("steps_per_print", 10**9)
    if bf16:
        _reduce_in_float32(config)
    return config


def automatic_sizes(hidden_size: int) -> dict[str, int]:
    """What "auto" means for DeepSpeed's buckets, in elements: what transformers' Trainer takes."""
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _reduce_in_float32(config: dict[str, Any]) -> None:
    """Have gradients of bfloat16 weights reduced in float32, and accumulated from ZeRO 2 on; below, see `accumulate_in_float32`."""
    config.setdefault("communication_data_type", "fp32")
    if config["zero_optimization"].get("stage", 0) >= FLOAT32_SUMS:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def trainer_deepspeed_config(path: str | None, bf16: bool = False) -> dict[str, Any] | None:
    """A DeepSpeed file for transformers' Trainer, which fills in each "auto": sizes, clipping and precision.

    None without a file.
    """
    if path is None:
        return None
    config = read_deepspeed_file(path)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config |= dict.fromkeys(sizes, "auto")
    config["bf16"] = {**config.get("bf16", {}), "enabled": "auto"}
    config["zero_force_ds_cpu_optimizer"] = False
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # saves in the dtype of the weights, despite the name
    if bf16:
        _reduce_in_float32(config)
    return config
