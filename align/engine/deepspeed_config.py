"""What DeepSpeed is told of each model: the recipe's JSON files, with the sizes of this run filled in.

Roles are "policy" (also the one model of the other stages), "value", "reference" and "reward".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.config.base import DEEPSPEED_KEYS, StageRecipe


def uses_deepspeed(recipe: StageRecipe) -> bool:
    """Whether any model has a DeepSpeed file."""
    return any(getattr(recipe, key, None) for key in DEEPSPEED_KEYS)


def _file(recipe: StageRecipe, role: str) -> str | None:
    path: str | None = getattr(recipe, f"{role}_deepspeed", None) or recipe.deepspeed
    return path


def zero_stage(recipe: StageRecipe, role: str = "policy") -> int:
    """The ZeRO stage of a model; 0 without a DeepSpeed file."""
    path = _file(recipe, role)
    if path is None:
        return 0
    return int(json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))


def deepspeed_config(recipe: StageRecipe, role: str, processes: int, accumulation: int) -> dict[str, Any]:
    """A model's DeepSpeed file with every "auto" filled in from the recipe."""
    path = _file(recipe, role)
    config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = accumulation * processes
    config["gradient_clipping"] = recipe.max_grad_norm
    config["bf16"] = {**config.get("bf16", {}), "enabled": recipe.bf16}
    config.setdefault("zero_allow_untested_optimizer", True)
    config["zero_force_ds_cpu_optimizer"] = False
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for name in [name for name, value in zero.items() if value == "auto"]:
        del zero[name]  # DeepSpeed's own default
    config.setdefault("steps_per_print", 10**9)
    return config


def trainer_deepspeed_config(recipe: StageRecipe) -> dict[str, Any] | None:
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
