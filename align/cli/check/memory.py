"""How much memory a stage needs per GPU, from its models' configurations alone: no weights are loaded.

Bytes per parameter of a model that trains with AdamW, 16 in all:

    float32    4 weight   4 gradient    8 optimizer (two moments)
    bfloat16   2 weight   2 gradient   12 optimizer (float32 master weight and two moments)

Other optimizers keep less than two moments, see `moment_bytes`.

A frozen parameter has its weight only. ZeRO 1 divides the optimizer states by the number of processes N, ZeRO 2 the
gradients too, ZeRO 3 the weights too, also of frozen models (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from rich.table import Table
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from align.config.base import StageRecipe
from align.config.optimizer import EIGHT_BIT
from align.engine.batch_plan import BatchPlan
from align.engine.deepspeed_config import zero_stage
from align.errors import UserError, reason
from align.models.trainable import check_target_modules, freeze, peft_config
from align.runs.tables import make_table

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Footprint:
    """One model of a stage."""

    name: str
    parameters: int
    trained: int  # parameters that train; 0: frozen
    gathered: bool = False  # a whole copy of a model, which only ZeRO 3 makes


def moment_bytes(optim: str, optim_args: Mapping[str, Any]) -> int:
    """Bytes per parameter that an optimizer keeps beside float32 weights.

    Those of Adafactor, a number for each row and column, are left out, and of 8-bit AdamW those that it keeps of a block of
    256 values.
    """
    if optim == "adafactor":
        return 0
    if optim in EIGHT_BIT:
        return 2
    if optim == "sgd":
        return 4 * bool(optim_args.get("momentum"))
    if optim in ("adagrad", "rmsprop"):
        return 4 * (1 + bool(optim_args.get("momentum")) + bool(optim_args.get("centered")))
    return 8


def state_bytes(model: Footprint, zero_stage: int, processes: int, bf16: bool, moments: int = 8) -> float:
    """Bytes per GPU for a model's weights, gradients and optimizer states; formula above.

    Args:
        moments: `moment_bytes`.
    """
    weight, gradient, optimiser = (2, 2, 4 + moments) if bf16 else (4, 4, moments)
    return (
        model.parameters * weight / (processes if zero_stage >= 3 else 1)
        + model.trained * gradient / (processes if zero_stage >= 2 else 1)
        + model.trained * optimiser / (processes if zero_stage >= 1 else 1)
    )


def activation_bytes(
    config: PretrainedConfig, sequences: int, tokens: int, bf16: bool, checkpointing: bool, vocabulary: bool
) -> float:
    """Rough bytes that one forward-backward pass keeps for `sequences` of `tokens` tokens.

    Per token: 17 values of the hidden size in each layer (arXiv 2205.05198 without attention scores, which fused
    attention does not keep); with gradient checkpointing one value per layer and 17 in one layer at a time; and with
    a `vocabulary`, the logits, and in float32 their log-softmax and gradient.
    """
    text = config.get_text_config()
    width = 2 if bf16 else 4
    kept = text.num_hidden_layers + 17 if checkpointing else 17 * text.num_hidden_layers
    logits = text.vocab_size * (width + 4 + 4) if vocabulary else 0
    return float(sequences * tokens * (kept * text.hidden_size * width + logits))


def skeleton(auto: Any, config: PretrainedConfig, trust_remote_code: bool = False, **changes: Any) -> PreTrainedModel:
    """The model of this configuration with shapes and no storage.

    Args:
        auto: `AutoModelForCausalLM` or another auto class.
        changes: entries of the configuration to change, such as `num_labels`.

    Raises:
        UserError: no model can be built from it.
    """
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers raises for this configuration
        raise UserError(
            f"{config.name_or_path}: transformers cannot build this {config.model_type} model. {reason(error)}"
        ) from error
    return model


def count_parameters(model: nn.Module, trained: bool = False) -> int:
    """Parameters, tied ones once; `trained` counts those alone that have a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)


def count_trained(
    model: PreTrainedModel, recipe: StageRecipe, task_type: str, head: nn.Module, whole: Sequence[str] = ()
) -> tuple[int, int]:
    """Parameters of a skeleton, and those that the recipe's `method` trains. Changes the skeleton.

    Args:
        head: the output head, for methods that freeze.
        whole: names of modules that are trained whole by adapters and `method: head`.

    Raises:
        UserError: the method does not fit the model.
    """
    check_target_modules(model, recipe.lora_target_modules)
    adapter = peft_config(recipe, model.config, task_type, whole)
    if adapter is None:
        freeze(model, head, recipe.method, recipe.freeze_layers, recipe.trainable_pattern, whole)
        return count_parameters(model), count_parameters(model, trained=True)
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter)
    except ValueError as error:
        raise UserError(f"method: {recipe.method} does not fit this model: {error}") from error
    return count_parameters(adapted), count_parameters(adapted, trained=True)


def memory_table(recipe: StageRecipe, models: Sequence[Footprint], plan: BatchPlan) -> Table:
    """Memory per GPU by model and ZeRO stage, and at the stages of the recipe's DeepSpeed files."""
    moments = moment_bytes(recipe.optim, recipe.optim_args)
    needs = [
        [0, 0, 0, state_bytes(model, 0, 1, recipe.bf16)]
        if model.gathered
        else [state_bytes(model, stage, plan.world_size, recipe.bf16, moments) for stage in range(4)]
        for model in models
    ]
    stages = [zero_stage(recipe, model.name) for model in models]
    own = [sizes[stage] for sizes, stage in zip(needs, stages, strict=True)]
    columns = [*(f"ZeRO {stage}" for stage in range(4)), "this recipe"]
    dtype = "bfloat16" if recipe.bf16 else "float32"
    table = make_table(
        f"Memory per GPU, {plan.world_size} process{'es' * (plan.world_size > 1)}, {dtype}, {recipe.optim}, without activations",
        "model",
        "parameters",
        *columns,
    )
    for model, sizes, stage, size in zip(models, needs, stages, own, strict=True):
        mine = f"{_shown(size)} (ZeRO {stage})" if size else ""
        table.add_row(model.name, f"{model.parameters:,}{_share(model)}", *map(_shown, sizes), mine)
    table.add_row("all", "", *(_shown(sum(column)) for column in zip(*needs, strict=True)), _shown(sum(own)))
    return table


def _share(model: Footprint) -> str:
    return f" ({model.trained:,} trained)" if 0 < model.trained < model.parameters else ""


def _shown(size: float) -> str:
    if size == 0:
        return ""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def activations_line(
    config: PretrainedConfig, sequences: int, tokens: int, recipe: StageRecipe, has_logits: bool
) -> str:
    """The line below the table: what a micro-batch of `sequences` sequences of `tokens` tokens adds."""
    size = activation_bytes(config, sequences, tokens, recipe.bf16, recipe.gradient_checkpointing, has_logits)
    return f"  activations: roughly {_shown(size)} more for {sequences} sequences of up to {tokens} tokens"
