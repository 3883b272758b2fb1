"""How much memory a stage needs per GPU, from its models' configurations alone: no weights are loaded.

`engine_memory.py` has the bytes of one model.
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

from align.cli.check.engine_memory import Bytes, Layout, engine_bytes, ready_layout
from align.config.base import StageRecipe
from align.config.optimizer import EIGHT_BIT
from align.engine.batch_plan import BatchPlan
from align.engine.deepspeed_config import deepspeed_file, uses_deepspeed
from align.errors import UserError, reason
from align.generation.batch_size import SHARE, row_bytes
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


def memory_table(recipe: StageRecipe, models: Sequence[Footprint], plan: BatchPlan, hidden_size: int) -> Table:
    """Memory per GPU by model and ZeRO stage, and by the recipe's DeepSpeed files, with what these offload to the host.

    What passes, such as gathered weights, is in the sum once, that of the model with the most.

    Args:
        hidden_size: of the models, of which the size of DeepSpeed's buckets is made.
    """
    rows, own, columns = [], Bytes(), [Bytes()] * 4
    for model in models:
        ready = [ready_layout(stage, plan.processes, hidden_size) for stage in range(4)]
        by_stage = [needs(recipe, model, layout) for layout in ready]
        layout = recipe_layout(recipe, model.name, plan.processes, hidden_size)
        mine = needs(recipe, model, layout)
        where = "plain torch" if layout.stage is None else f"ZeRO {layout.stage}"
        shown = f"{_shown(mine.gpu_peak)} ({where})" if mine.gpu_peak else ""
        sizes = [_shown(each.gpu_peak) for each in by_stage]
        rows.append([model.name, f"{model.parameters:,}{_share(model)}", *sizes, shown, _shown(mine.host)])
        own, columns = own + mine, [each + more for each, more in zip(columns, by_stage, strict=True)]
    dtype = "bfloat16" if recipe.bf16 else "float32"
    table = make_table(
        f"Memory per GPU, {plan.processes} process{'es' * (plan.processes > 1)}, {dtype}, {recipe.optim}, without activations",
        *("model", "parameters", *(f"ZeRO {stage}" for stage in range(4)), "this recipe"),
        *["host"] * bool(own.host),
    )
    together = [_shown(each.gpu_peak) for each in (*columns, own)]
    for row in [*rows, ["all, at their peak", "", *together, _shown(own.host)]]:
        table.add_row(*row[: len(table.columns)])
    return table


def needs(recipe: StageRecipe, model: Footprint, layout: Layout) -> Bytes:
    """Memory per process for a model of the recipe in this layout."""
    if model.gathered:  # a plain copy, at ZeRO 3 alone
        return Bytes(passing=model.parameters * (2 if recipe.bf16 else 4) * (layout.stage == 3))
    moments = moment_bytes(recipe.optim, recipe.optim_args)
    return engine_bytes(model.parameters, model.trained, layout, recipe.bf16, moments)


def recipe_layout(recipe: StageRecipe, name: str, processes: int, hidden_size: int) -> Layout:
    """How a model of the recipe is spread, by its name in the table."""
    role = "reward" if name.startswith(("reward", "judge")) else name
    own = Layout.from_file(deepspeed_file(recipe, role), processes, hidden_size)
    return Layout(0, processes) if own.stage is None and uses_deepspeed(recipe) else own


def _share(model: Footprint) -> str:
    return f" ({model.trained:,} trained)" if 0 < model.trained < model.parameters else ""


def _shown(size: float) -> str:
    if size == 0:
        return ""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def activations_line(
    config: PretrainedConfig,
    sequences: int,
    tokens: int,
    recipe: StageRecipe,
    has_logits: bool,
    max_tokens: int | None = None,
) -> str:
    """The line below the table: what a micro-batch adds, of `sequences` sequences of `tokens` tokens, or of `max_tokens` tokens."""
    if max_tokens is not None:
        size = activation_bytes(config, 1, max_tokens, recipe.bf16, recipe.gradient_checkpointing, has_logits)
        return f"  activations: roughly {_shown(size)} more for a pass of {max_tokens} tokens"
    size = activation_bytes(config, sequences, tokens, recipe.bf16, recipe.gradient_checkpointing, has_logits)
    processes: int = getattr(recipe, "sequence_parallel_size", 1)
    split = f", split over {processes} processes (sequence_parallel_size)" if processes > 1 else ""
    return f"  activations: roughly {_shown(size / processes)} more for {sequences} sequences of up to {tokens} tokens{split}"


def decoding_line(config: PretrainedConfig, rows: int | None, prompt: int, response: int, bf16: bool) -> str:
    """The line on what decoding takes on a GPU: `rows` rows at once, or by default as many as its share of the memory holds.

    Args:
        prompt, response: most tokens of each.
    """
    key, size = "per_device_generation_batch_size", row_bytes(config, prompt, response, 2 if bf16 else 4)
    if rows is None:
        return f"  decoding: 1/{SHARE} of the GPU's memory, for as many rows of {_shown(size)} as it holds; lower it by {key}"
    return f"  decoding: {_shown(rows * size)} for {rows} rows at once ({key})"


def load_line(models: Sequence[Footprint], config: PretrainedConfig) -> str:
    """The line on the host's memory while models load: the pages of a file in the precision of `config`.

    Processes share them, and copy from them to their GPUs; under ZeRO-3 the first one reads, and hands out parts.
    """
    width = getattr(config.dtype, "itemsize", 4)
    largest = max(model.parameters for model in models) * width
    return f"  host: up to {_shown(largest)} a machine while a model loads: its file's pages, which all processes share"


def head_line(config: PretrainedConfig) -> str:
    """The line on the gradient of a head that trains: computed chunk by chunk, apart from those that are accumulated."""
    text = config.get_text_config()
    return f"  head: {_shown(4 * text.vocab_size * text.hidden_size)} more for the gradient of a microbatch"
