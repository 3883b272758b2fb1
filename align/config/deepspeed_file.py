"""Read and validate DeepSpeed's JSON files."""

from __future__ import annotations

import difflib
import math
import os.path
from typing import Any

from align.config.convert import kind, shown
from align.config.text_file import read_json
from align.errors import UserError

# DeepSpeed checks its file only after the models are loaded, and parts of it not at all. Any value may be "auto" too.
_TOP_KEYS: dict[type, str] = {
    dict: "zero_optimization bf16 fp16 amp optimizer scheduler activation_checkpointing aio autotuning checkpoint "
    "comms_logger compression_training comet csv_monitor data_efficiency data_types elasticity eigenvalue flops_profiler "
    "hybrid_engine pipeline progressive_layer_drop tensorboard tensor_parallel timers torch_autocast wandb compile",
    int: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print vocabulary_size",
    float: "gradient_clipping gradient_predivide_factor",
    bool: "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients wall_clock_breakdown "
    "memory_breakdown dump_state disable_allgather dataloader_drop_last sparse_gradients graph_harvesting",
    str: "communication_data_type seq_parallel_communication_data_type gradient_allreduce_op log_level",
}
_ZERO_KEYS: dict[type, str] = {
    int: "stage reduce_bucket_size allgather_bucket_size sub_group_size zero_hpz_partition_size "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold",
    bool: "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
    "load_from_fp32_weights elastic_checkpoint cpu_offload cpu_offload_param cpu_offload_use_pin_memory "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters legacy_stage1 "
    "round_robin_gradients zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
    "memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings",
    dict: "offload_param offload_optimizer",
}
TOP_TYPES = {name: expected for expected, names in _TOP_KEYS.items() for name in names.split()}
ZERO_TYPES = {name: expected for expected, names in _ZERO_KEYS.items() for name in names.split()}
_NAMES = {dict: "an object", int: "a whole number from 0", float: "a number from 0", bool: "true or false", str: "text"}
_WRITERS = ("tensorboard", "csv_monitor", "wandb", "comet", "autotuning")  # sections that write where they say
_OFFLOAD_DEVICES = ("none", "cpu", "nvme")


def read_deepspeed_file(path: str, where: str = "deepspeed") -> dict[str, Any]:
    """The contents of a DeepSpeed configuration file, the types of its values checked.

    Args:
        where: the recipe key that names the file, for errors.

    Raises:
        UserError: no such file, it is not a JSON object, a key that is misspelt or written twice, a value of another
            type or out of range, or one that is not supported here.
    """
    if not os.path.lexists(path):
        raise UserError(f"{where}: {path}: no such file; see recipes/deepspeed for ready ones.")
    config = read_json(path, where)
    _check_types(config, TOP_TYPES, f"{where}: {path}")
    # null offloads nothing, as in DeepSpeed
    zero = {
        name: value
        for name, value in config.get("zero_optimization", {}).items()
        if value is not None or not name.startswith("offload_")
    }
    _check_types(zero, ZERO_TYPES, f"{where}: {path}: zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):  # nor "auto"
        raise UserError(f"{where}: {path}: zero_optimization.stage: expected 0, 1, 2 or 3, got {shown(stage)}")
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(name, {}).get("device", "none")
        if device not in _OFFLOAD_DEVICES:
            raise UserError(
                f"{where}: {path}: zero_optimization.{name}.device: expected one of {', '.join(_OFFLOAD_DEVICES)}, got "
                f"{shown(device)}"
            )
        if device != "none" and stage < lowest:
            raise UserError(
                f"{where}: {path}: zero_optimization.{name}: needs stage {lowest}{' or more' * (lowest < 3)}, got stage "
                f"{stage}; raise it, or leave {name} out"
            )
    optimizer = zero.get("offload_optimizer", {})
    if optimizer.get("device") == "nvme" or optimizer.get("ratio", 1) != 1:
        raise UserError(
            f"{where}: {path}: zero_optimization.offload_optimizer: a state on NVMe, or offloaded in part, is not supported, "
            'since checkpoints could not hold it; use {"device": "cpu"}.'
        )
    weights = zero.get("offload_param", {})
    swap = weights.get("nvme_path")
    if weights.get("device") == "nvme" and not (isinstance(swap, str) and os.path.isdir(swap)):
        raise UserError(
            f"{where}: {path}: zero_optimization.offload_param.nvme_path: expected an existing folder, got {shown(swap)}; "
            "make it, or name another."
        )
    for name in _WRITERS:
        if config.get(name, {}).get("enabled", False):
            raise UserError(f"{where}: {path}: {name} writes files of its own; leave it out, and use report_to.")
    if config.get("flops_profiler", {}).get("output_file"):
        raise UserError(
            f"{where}: {path}: flops_profiler.output_file would be overwritten; leave it out, and the profile is printed."
        )
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise UserError(
                f"{where}: {path}: {name}: is set by the recipe's keys (optim, learning_rate, lr_scheduler_type, ...), in "
                "every stage; leave it out of this file."
            )
    for name in ("bf16", "fp16"):
        _check_types(config.get(name, {}), {"enabled": bool}, f"{where}: {path}: {name}")
    if config.get("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise UserError(f"{where}: {path} switches fp16 on, which is not supported; leave it out and use `bf16: true`.")
    return config


def zero_stage_of(path: str | None) -> int:
    """The ZeRO stage that a DeepSpeed file sets; 0 without a file."""
    if path is None:
        return 0
    return int(read_deepspeed_file(path).get("zero_optimization", {}).get("stage", 0))


def _check_types(values: dict[str, Any], types: dict[str, type], where: str) -> None:
    for name, value in values.items():
        if name not in types:
            if meant := difflib.get_close_matches(name, types, n=1, cutoff=0.85):
                raise UserError(f"{where}: {name}: unknown key; did you mean {meant[0]!r}?")
            continue  # DeepSpeed has more keys than these, and ignores those that it does not know
        if value == "auto" and types[name] is not dict:
            continue
        if not _fits(value, types[name]):
            got = shown(value) if not isinstance(value, dict | list) else kind(value)
            raise UserError(f"{where}: {name}: expected {_NAMES[types[name]]}, got {got}")


def _fits(value: Any, expected: type) -> bool:
    if expected not in (int, float):
        return isinstance(value, expected)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return number and (expected is float or float(value).is_integer())
