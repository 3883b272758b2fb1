"""Global batch sizes split over processes, microbatches and gradient accumulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from align.config.base import DEEPSPEED_KEYS, StageRecipe, TrainerRecipe
from align.config.deepspeed_file import read_deepspeed_file
from align.config.ppo import PPORecipe
from align.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a global batch is split; `batch_size == world_size * micro_batch_size * accumulation`.

    With a token budget (`max_tokens`) the passes of a step depend on the lengths of its sequences; a pass for each sequence is
    the most that there can be, and is what `micro_batch_size` and `accumulation` say.
    """

    world_size: int  # processes, or groups of `sequence_parallel_size` processes that share rows
    batch_size: int  # sequences per optimizer step over all processes
    micro_batch_size: int  # sequences of one forward-backward pass on one process
    accumulation: int  # passes per optimizer step
    rollout_per_rank: int | None = None  # PPO: prompts per update on one process
    updates: int | None = None  # PPO: updates of the whole run
    ptx_per_rank: int = 0  # PPO-ptx: rows per optimizer step on one process
    sequence_parallel_size: int = 1
    max_tokens: int | None = None  # PPO: tokens of one pass on one process, padding included

    @property
    def policy_passes(self) -> int:
        """Forward-backward passes of the policy per optimizer step, those of PPO-ptx included."""
        return self.accumulation + -(-self.ptx_per_rank // self.micro_batch_size)

    @property
    def processes(self) -> int:
        """All of them."""
        return self.world_size * self.sequence_parallel_size

    def passes(self, lengths: Sequence[int], rows: int | None = None) -> list[list[list[int]]]:
        """Indices of the sequences of each pass, by process; all processes have equally many passes.

        Sequences are dealt out in order of length: passes need little padding, and processes have equal work.

        Args:
            lengths: tokens of each sequence, as many for each process.
            rows: sequences of a pass, `micro_batch_size` by default; not read with a token budget.
        """
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        shares = [by_length[rank :: self.world_size] for rank in range(self.world_size)]
        if self.max_tokens is None:
            size = rows or self.micro_batch_size
            return [[share[start : start + size] for start in range(0, len(share), size)] for share in shares]
        most = max(len(pack_by_length(share, lengths, self.max_tokens)) for share in shares)
        return [pack_by_length(share, lengths, self.max_tokens, most) for share in shares]

    def describe(self) -> str:
        """The plan in one line."""
        ranks = f"groups of {self.sequence_parallel_size} processes" if self.sequence_parallel_size > 1 else "processes"
        own = f"{self.micro_batch_size} x {self.accumulation} ({ranks} x micro-batch x accumulation)"
        if self.max_tokens is not None:
            own = f"{self.accumulation} (processes x sequences), in passes of up to {self.max_tokens} tokens"
        line = f"{self.batch_size} sequences per step = {self.world_size} x {own}"
        if self.updates is not None:
            line += f", {self.updates} update{'s' * (self.updates != 1)} of {self.processes} x {self.rollout_per_rank} "
            line += "responses (processes x responses)"
        return line


def batch_plan(recipe: StageRecipe, world_size: int) -> BatchPlan:
    """Split the recipe's global sizes over `world_size` processes.

    The microbatch is the largest size up to `per_device_train_batch_size` that divides a process's share; with
    `max_tokens_per_device` see `BatchPlan`.

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

    def share(name: str, ranks: int, what: str) -> int:
        size: int = getattr(recipe, name)
        if size % ranks:
            near = [n for n in (size - size % ranks, size + ranks - size % ranks) if n]
            raise UserError(
                f"{name}: expected a multiple of the {ranks} {what}, got {size}; "
                f"use {' or '.join(map(str, near))}, or another number of processes."
            )
        return size // ranks

    name = "train_batch_size" if isinstance(recipe, TrainerRecipe) else "minibatch_size"
    own = share(name, world_size, what)
    max_tokens = recipe.max_tokens_per_device if isinstance(recipe, PPORecipe) else None
    most = recipe.per_device_train_batch_size if max_tokens is None else 1
    micro = next(size for size in range(min(own, most), 0, -1) if own % size == 0)
    plan = BatchPlan(
        world_size, own * world_size, micro, own // micro, sequence_parallel_size=group, max_tokens=max_tokens
    )
    if isinstance(recipe, PPORecipe):
        plan = dataclasses.replace(
            plan, rollout_per_rank=share("rollout_batch_size", plan.processes, "processes"), updates=recipe.num_updates
        )
        if recipe.ptx_dataset:
            plan = dataclasses.replace(plan, ptx_per_rank=share("ptx_batch_size", plan.processes, "processes"))
    for name in DEEPSPEED_KEYS:
        if not (path := getattr(recipe, name, None)):
            continue
        sizes = read_deepspeed_file(path, name)
        for key, planned in (
            ("train_batch_size", plan.batch_size),
            ("train_micro_batch_size_per_gpu", plan.micro_batch_size if max_tokens is None else "auto"),
            ("gradient_accumulation_steps", plan.accumulation if max_tokens is None else "auto"),
        ):
            if sizes.get(key, "auto") not in ("auto", planned):
                expected = '"auto"' if planned == "auto" else f'"auto" or {planned}'
                raise UserError(f"{path}: {key}: expected {expected} ({plan.describe()}), got {sizes[key]!r}")
    return plan


def pack_by_length(rows: Sequence[int], lengths: Sequence[int], max_tokens: int, least: int = 1) -> list[list[int]]:
    """Cut rows into as few passes as hold `max_tokens` tokens each, padding included, longest rows first.

    Args:
        rows: indices into `lengths`.
        lengths: tokens of each row; of one that is longer than `max_tokens` the pass holds nothing else.
        least: passes that there are at least, which is no more than there are rows: those with most tokens are halved.
    """
    passes: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= max_tokens:
            passes[-1].append(row)
        else:
            passes.append([row])
    while len(passes) < least:
        several = [number for number, each in enumerate(passes) if len(each) > 1]
        largest = max(several, key=lambda number: len(passes[number]) * lengths[passes[number][0]])
        half = len(passes[largest]) // 2
        passes[largest : largest + 1] = [passes[largest][:half], passes[largest][half:]]
    return passes
