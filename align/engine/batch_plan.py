"""Global batch sizes split over processes, microbatches and gradient accumulation."""

from __future__ import annotations

import dataclasses

from align.config.base import DEEPSPEED_KEYS, StageRecipe, TrainerRecipe
from align.config.deepspeed_file import read_deepspeed_file
from align.config.ppo import PPORecipe
from align.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a global batch is split; `batch_size == world_size * micro_batch_size * accumulation`."""

    world_size: int  # processes, or groups of `sequence_parallel_size` processes that share rows
    batch_size: int  # sequences per optimizer step over all processes
    micro_batch_size: int  # sequences of one forward-backward pass on one process
    accumulation: int  # passes per optimizer step
    rollout_per_rank: int | None = None  # PPO: prompts per update on one process
    updates: int | None = None  # PPO: updates of the whole run
    ptx_per_rank: int = 0  # PPO-ptx: rows per optimizer step on one process
    sequence_parallel_size: int = 1

    @property
    def policy_passes(self) -> int:
        """Forward-backward passes of the policy per optimizer step, those of PPO-ptx included."""
        return self.accumulation + -(-self.ptx_per_rank // self.micro_batch_size)

    @property
    def processes(self) -> int:
        """All of them."""
        return self.world_size * self.sequence_parallel_size

    def describe(self) -> str:
        """The plan in one line."""
        line = (
            f"{self.batch_size} sequences per step = {self.world_size} x {self.micro_batch_size} x {self.accumulation}"
        )
        ranks = f"groups of {self.sequence_parallel_size} processes" if self.sequence_parallel_size > 1 else "processes"
        line += f" ({ranks} x micro-batch x accumulation)"
        if self.updates is not None:
            line += (
                f", {self.updates} update{'s' * (self.updates != 1)} of {self.world_size} x {self.rollout_per_rank} "
            )
            line += "responses (processes x responses)"
        return line


def batch_plan(recipe: StageRecipe, world_size: int) -> BatchPlan:
    """Split the recipe's global sizes over `world_size` processes.

    The microbatch is the largest size up to `per_device_train_batch_size` that divides a process's share.

    Raises:
        UserError: a global size is not a multiple of `world_size`, a DeepSpeed file sets another size, or processes cannot be
            grouped as `sequence_parallel_size` says.
    """
    group: int = getattr(recipe, "sequence_parallel_size", 1)
    if world_size % group:
        raise UserError(
            f"sequence_parallel_size: expected a number that divides the {world_size} process{'es' * (world_size > 1)}, got "
            f"{group}; start a multiple of {group} processes, or leave it out."
        )
    world_size //= group
    what = "groups of processes" if group > 1 else "processes"

    def share(name: str) -> int:
        size: int = getattr(recipe, name)
        if size % world_size:
            near = [n for n in (size - size % world_size, size + world_size - size % world_size) if n]
            raise UserError(
                f"{name}: expected a multiple of the {world_size} {what}, got {size}; "
                f"use {' or '.join(map(str, near))}, or another number of processes."
            )
        return size // world_size

    name = "train_batch_size" if isinstance(recipe, TrainerRecipe) else "minibatch_size"
    own = share(name)
    micro = next(size for size in range(min(own, recipe.per_device_train_batch_size), 0, -1) if own % size == 0)
    plan = BatchPlan(world_size, own * world_size, micro, own // micro, sequence_parallel_size=group)
    if isinstance(recipe, PPORecipe):
        plan = dataclasses.replace(plan, rollout_per_rank=share("rollout_batch_size"), updates=recipe.num_updates)
        if recipe.ptx_dataset:
            plan = dataclasses.replace(plan, ptx_per_rank=share("ptx_batch_size"))
    for name in DEEPSPEED_KEYS:
        if not (path := getattr(recipe, name, None)):
            continue
        sizes = read_deepspeed_file(path, name)
        for key, planned in (
            ("train_batch_size", plan.batch_size),
            ("train_micro_batch_size_per_gpu", plan.micro_batch_size),
            ("gradient_accumulation_steps", plan.accumulation),
        ):
            if sizes.get(key, "auto") not in ("auto", planned):
                raise UserError(f'{path}: {key}: expected "auto" or {planned} ({plan.describe()}), got {sizes[key]!r}')
    return plan
