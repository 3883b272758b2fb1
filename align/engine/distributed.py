"""The processes of a run: joining the group, its collectives, and the shared memory that dead runs left behind."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from align.config.base import StageRecipe
from align.engine.cpu import configure_cpu
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.timer import Clock
from align.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_FILES = "deepspeed_allreduce_buffer_*"


@dataclass(frozen=True, slots=True)
class World:
    """The processes of this run and the collectives that the stages use. With one process each is the identity."""

    rank: int
    size: int
    device: torch.device
    clock: Clock = field(default_factory=Clock, compare=False)

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

    def check_rows(self, count: int) -> None:
        """See that there is a training row for every process.

        Raises:
            UserError: there is not.
        """
        if count < self.size:
            raise UserError(
                f"train_dataset: {count} usable rows for {self.size} processes; give more rows, or start at most {count}."
            )

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def rows_of_rank(world: World, count: int) -> list[int]:
    """This rank's rows of `count`. All ranks have as many, so the last may repeat a row."""
    share = -(-count // world.size)
    return [min(index, count - 1) for index in range(world.rank * share, (world.rank + 1) * share)]


def remove_stale_shared_memory(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Delete DeepSpeed's shared-memory files of this user that no living process maps. Returns what was deleted."""
    candidates = [path for path in folder.glob(SHARED_MEMORY_FILES) if path.stat().st_uid == os.getuid()]
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


def connect(recipe: StageRecipe) -> World:
    """Join the process group of the `deepspeed` launcher, if it started this process; clear what dead runs left behind."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    configure_cpu()
    if int(os.environ.get("RANK", "0")) == 0:
        remove_stale_shared_memory()
    if size > 1 or uses_deepspeed(recipe):
        import deepspeed

        # DeepSpeed's own CPU collective saves nothing at our sizes, needs a compiler at the first start and
        # leaves 69 MB a process in shared memory; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            if "MASTER_ADDR" not in os.environ:  # one process without the launcher
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return World(rank=int(os.environ.get("RANK", "0")), size=size, device=device, clock=Clock(device))


def disconnect() -> None:
    """Leave the process group, after all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
