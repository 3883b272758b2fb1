"""One rank fails: every rank ends within seconds, by itself, and one error is printed."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

from align.engine.distributed import connect
from align.engine.rank_errors import reported
from align.errors import UserError
from align.runs.command_line import INTERRUPTED, exit_code
from align.runs.launch import end_on_signals
from tests.ranks import Ranks, start


def fail(error: str, failing: list[int], before: bool = False) -> int:
    """What a rank of a stage does, whose failing ranks raise or are killed while the others wait in a collective."""
    rank = int(os.environ["RANK"])

    def stage() -> int:
        with reported():
            if before and rank in failing:
                raise UserError(error)
            world = connect(deepspeed_files=False)
            world.barrier()
            if rank in failing:
                if error == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.2 * (2 - rank))  # where all fail alike, rank 0 is the last
                raise (
                    UserError(f"{error}\n of {'all' if len(failing) > 1 else rank}")
                    if error != "bug"
                    else KeyError(error)
                )
            world.barrier()
        return 0

    return exit_code(stage)


def errors(ranks: Ranks) -> list[str]:
    return [line for line in ranks.stderr.splitlines() if line.startswith("error")]


@pytest.mark.parametrize(
    ("failing", "before", "told"),
    [
        ([1], False, "error: rank 1: no such row of 1"),
        ([0], False, "error: no such row of 0"),
        ([0, 1, 2], False, "error: no such row of all"),
        ([2], True, "error: rank 2: no such row"),
    ],
)
def test_an_error_ends_all_ranks_and_is_printed_once(
    tmp_path: Path, failing: list[int], before: bool, told: str
) -> None:
    ranks = start(fail, "no such row", failing, before, ranks=3, log=tmp_path / "rank")
    assert ranks.wait(60) == [2, 2, 2], ranks.stderr
    assert errors(ranks) == [told]


def test_a_bug_on_one_rank_has_its_traceback_alone(tmp_path: Path) -> None:
    ranks = start(fail, "bug", [1], ranks=2, log=tmp_path / "rank")
    assert ranks.wait(60) == [1, 1], ranks.stderr
    assert ranks.stderr.count("Traceback") == 1
    assert "KeyError: 'bug'" in ranks.stderr
    assert errors(ranks) == []


def test_a_rank_that_was_killed(tmp_path: Path) -> None:
    ranks = start(fail, "killed", [1], ranks=2, log=tmp_path / "rank")
    assert ranks.wait(60) == [2, -signal.SIGKILL], ranks.stderr
    (error,) = errors(ranks)
    assert error.startswith("error: lost the connection to another process of this run")


def hang(folder: str) -> None:
    """A stage whose main thread is in C and heeds no signal."""
    end_on_signals()
    mutex = ctypes.create_string_buffer(128)
    Path(folder, "ready").touch()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def test_the_second_interrupt_ends_what_the_first_does_not(tmp_path: Path) -> None:
    process = start(hang, str(tmp_path), log=tmp_path / "log")
    process.wait_for(lambda: (tmp_path / "ready").exists())
    pid = process.processes[0].pid or 0
    time.sleep(0.1)  # until it waits in C
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert process.running()
    for _ in range(100):  # a signal is lost if the one before has not been taken, as on a busy machine
        if process.running():
            os.kill(pid, signal.SIGINT)
            time.sleep(0.1)
    assert process.wait(0) == [130]
    assert process.stderr == f"{INTERRUPTED}\n"
