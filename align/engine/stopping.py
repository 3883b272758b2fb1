"""SIGTERM during training: the loop finishes its step, saves a checkpoint and exits within the scheduler's grace period."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from align.engine import rank_errors
from align.terminal import say

if TYPE_CHECKING:
    from align.engine.distributed import World  # torch, which a command imports once its signals are watched

ONE_SIGNAL = 2.0  # seconds: a launcher passes on to its ranks what they, as part of its process group, get themselves


class Stopped(SystemExit):
    """A stage has ended at a SIGTERM, on all ranks after the same step, and has saved a checkpoint."""


_loop_runs = False  # in this process, one that looks at `stop_asked` after each step
_asked_at: float | None = None


@contextlib.contextmanager
def stops_between_steps() -> Iterator[None]:
    """For the block, leave a first SIGTERM to `stop_asked`, which the block calls after each step."""
    global _loop_runs
    _loop_runs = True
    try:
        yield
    finally:
        _loop_runs = False


def ask_to_stop() -> bool:
    """Whether the training loop handles this SIGTERM; False if the process should end at once."""
    global _asked_at
    now = time.monotonic()
    if not _loop_runs or (_asked_at is not None and now > _asked_at + ONE_SIGNAL):
        return False
    first, _asked_at = _asked_at is None, _asked_at or now
    if first and os.environ.get("RANK", "0") == "0":
        say(
            "SIGTERM: ends after this step, with a checkpoint; a second SIGTERM ends at once, and so do `align run` and launchers "
            "if the step takes longer than they wait"
        )
    return True


def stop_asked(world: World) -> bool:
    """Whether any rank has received a SIGTERM. For all ranks, after the same step."""
    return world.any_rank(_asked_at is not None)


def stop(checkpoint: Path, world: World) -> NoReturn:
    """End the stage, whose checkpoint is complete. Every rank must call it.

    Raises:
        Stopped: always.
    """
    global _asked_at
    world.barrier()
    rank_errors.stop_watching()
    _asked_at = None
    if world.is_main:
        say(f"{checkpoint}: saved at SIGTERM; the same command continues from there")
    raise Stopped(rank_errors.TERMINATED)
