"""The private names of DeepSpeed that the package uses; see `align/compat/__init__.py`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Files that DeepSpeed's own CPU collective leaves in /dev/shm.
DEEPSPEED_SHARED_MEMORY_FILES = "deepspeed_allreduce_buffer_*"


# What ZeRO-3 adds to a parameter


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO-3 shards this parameter, whose own data is then empty outside forward and backward passes."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter over all ranks."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def local_shard(parameter: Any) -> Tensor:
    """This rank's part of a parameter: under ZeRO-3 a flat shard, padded to one size on all ranks; else all of it."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    return shard


# Where its optimizers keep what they step


def stepped_parts(optimizer: Any, parameters: Iterable[Any]) -> dict[Any, tuple[Tensor, int, int, int]] | None:
    """Where a DeepSpeed optimizer keeps the float32 weights that this rank steps.

    Returns:
        for each of the parameters of which this rank steps a part: the tensor that is a key of the inner optimizer's
        state, the offset of the part there, its offset in the flattened parameter, and its elements. None for an
        optimizer of torch's own, which steps the parameters themselves.
    """
    parts = {}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3; the last part of a parameter may be padded
        for parameter in parameters:
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = count * parameter.ds_zero_partition_rank
            held = max(0, min(count, parameter.ds_numel - start))
            parts[parameter] = (optimizer.fp32_partitioned_groups_flat[group], offset, start, held)
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2: each rank steps a range of all weights in a row
        if hasattr(optimizer, "round_robin_bit16_groups"):
            groups, flats = optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups
            offsets = optimizer.round_robin_bit16_offsets
        else:  # ZeRO 1 in bfloat16
            groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
            offsets = [[0, *accumulate(weight.numel() for weight in group)][:-1] for group in groups]
        for number, flat in enumerate(flats):
            begin = flat.numel() * optimizer.real_dp_process_group[number].rank()
            for weight, offset in zip(groups[number], offsets[number], strict=True):
                start, end = max(0, begin - offset), min(weight.numel(), begin + flat.numel() - offset)
                if start < end:
                    parts[weight] = (flat, offset + start - begin, start, end - start)
    elif hasattr(optimizer, "fp32_groups"):  # ZeRO 0 in bfloat16
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            parts |= {weight: (master, 0, 0, weight.numel()) for weight, master in zip(weights, masters, strict=True)}
    elif hasattr(optimizer, "fp32_groups_flat"):  # the same by DeepSpeed's own Adam
        for weights, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for weight in weights:
                parts[weight] = (flat, offset, 0, weight.numel())
                offset += weight.numel()
    else:
        return None
    return parts


def splits_state(optimizer: Any) -> bool:
    """Whether each rank steps a part of the weights only, as at ZeRO 1 to 3."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat") or hasattr(optimizer, "update_lp_params")


def copy_stepped_weights(optimizer: Any) -> None:
    """Copy the float32 weights of a DeepSpeed optimizer into those that the model computes with. Every rank must call it."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()  # lets go of gathered copies
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers again what stays gathered
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)
    elif hasattr(optimizer, "fp32_groups_flat"):
        for flat, master in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            flat.data.copy_(master.data)


def local_elements(parameter: Any) -> Tensor:
    """The values of a parameter that this rank has; under ZeRO-3 those of its shard, without the padding at its end."""
    shard = local_shard(parameter)
    if not is_sharded(parameter):
        return shard
    import torch.distributed

    begin = torch.distributed.get_rank() * shard.numel()
    return shard.flatten()[: max(0, full_shape(parameter).numel() - begin)]


def disable_deepspeed_shared_memory() -> None:
    """Make DeepSpeed use gloo on CPUs.

    Its own CPU collective saves nothing at our sizes, needs a compiler at the first start, and leaves 69 MB a process
    in shared memory.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
