"""The processes of a run: the process group, its collectives, and shared memory that killed runs left behind."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from align.compat.deepspeed import DEEPSPEED_SHARED_MEMORY_FILES, disable_deepspeed_shared_memory
from align.engine import rank_errors
from align.engine.cpu import configure_cpu
from align.engine.timer import Clock
from align.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
MARGIN = 60.0  # seconds that a collective waits longer than a user's function may take


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run and the collectives that stages use; on one process each is the identity."""

    rank: int
    size: int
    device: torch.device
    clock: Clock = field(default_factory=Clock, compare=False)
    tf32: bool = False  # whether float32 matrix products are TF32's: the recipe allows it, and the GPU has it

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over ranks, on every rank."""
        if self.size > 1:
            with self.clock.phase("communication"):
                dist.all_reduce(tensor := tensor.clone())
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over ranks, on every rank."""
        if self.size > 1:
            with self.clock.phase("communication"):
                dist.all_reduce(tensor := tensor.clone(), op=dist.ReduceOp.MAX)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is True on any rank."""
        return bool(self.max(torch.tensor(float(flag), device=self.device)))

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] of each rank (one shape for all) -> [size * n, ...] in rank order, on every rank."""
        if self.size == 1:
            return tensor
        carried = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        parts = [torch.empty_like(carried) for _ in range(self.size)]
        with self.clock.phase("communication"):
            dist.all_gather(parts, carried)
        return torch.cat(parts).to(tensor.dtype)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, on every rank; the others give one of the same shape and dtype."""
        if self.size == 1:
            return tensor
        carried = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        with self.clock.phase("communication"):
            dist.broadcast(carried, 0)
        return carried.to(tensor.dtype)

    def gather_text(self, text: str) -> list[str]:
        """A text from each rank, in rank order, on every rank."""
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        lengths = self.gather(torch.tensor([len(content)], device=self.device)).tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=self.device)
        padded[: len(content)] = content
        rows = self.gather(padded).view(self.size, len(padded)).tolist()
        return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]

    def check_rows(self, count: int, groups: int | None = None) -> None:
        """Check that there are at least as many training rows as processes, or groups of processes that share rows.

        Raises:
            UserError: there are fewer.
        """
        shares = self.size if groups is None else groups
        if count < shares:
            raise UserError(
                f"train_dataset: {count} usable rows for {shares} {'processes' if shares == self.size else 'groups of processes'}; "
                f"give more rows, or start at most {count * self.size // shares}."
            )

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def rows_of_rank(world: World, count: int) -> list[int]:
    """Indices of this rank's share of `count` rows. Shares have one size: the last ranks may repeat the last row."""
    share = -(-count // world.size)
    return [min(index, count - 1) for index in range(world.rank * share, (world.rank + 1) * share)]


def remove_stale_shared_memory(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Delete this user's DeepSpeed shared-memory files that no running process maps; returns the deleted paths."""
    candidates = [path for path in folder.glob(DEEPSPEED_SHARED_MEMORY_FILES) if path.stat().st_uid == os.getuid()]
    if not candidates:
        return []
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text(errors="replace")
    stale = [path for path in candidates if str(path) not in mapped]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def connect(deepspeed_files: bool, reward_timeout: float = 0.0, tf32: bool = True) -> World:
    """Join the process group of the `deepspeed` launcher if it started this process; remove stale shared memory.

    Args:
        deepspeed_files: whether a model has a DeepSpeed file, so that one process alone needs a group too.
        reward_timeout: seconds that a user's function may take on one rank while the others wait for it.
        tf32: as in the recipe.

    Raises:
        UserError: more processes were started on this machine than there are GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    if gpu:
        if local_rank >= torch.cuda.device_count():  # CUDA would say "invalid device ordinal"
            raise UserError(
                f"LOCAL_RANK is {local_rank}, and torch sees {torch.cuda.device_count()} GPU(s) (CUDA_VISIBLE_DEVICES: "
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start one process for each GPU of a machine."
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = tf32  # GPUs without it compute as before
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    configure_cpu()
    if int(os.environ.get("RANK", "0")) == 0:
        remove_stale_shared_memory()
    if size > 1 or deepspeed_files:
        import deepspeed
        from deepspeed.constants import default_pg_timeout  # ten minutes, or DEEPSPEED_TIMEOUT

        disable_deepspeed_shared_memory()
        if size > 1:
            rank_errors.watch(int(os.environ["RANK"]), size)  # before the group, which a failed rank never joins
        if not dist.is_initialized():
            if "MASTER_ADDR" not in os.environ:  # one process without the launcher
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            deepspeed.init_distributed(
                dist_backend="nccl" if gpu else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=max(default_pg_timeout, timedelta(seconds=reward_timeout + MARGIN)),
            )
    has_tf32 = gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    rank = int(os.environ.get("RANK", "0"))
    return World(rank=rank, size=size, device=device, clock=Clock(device), tf32=tf32 and has_tf32)


def disconnect() -> None:
    """Leave the process group once all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        rank_errors.stop_watching()
        dist.destroy_process_group()
