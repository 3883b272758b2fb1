"""Child processes of `align run`: process groups that end with it, a free port, exit codes in words."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import align
from align.runs.launch import PIPELINE

GRACE = 10.0  # seconds that a process has after SIGTERM


# Python searches the folder in which it is started with `-m` before its own modules, in the launcher too. So that is this
# one, and not the user's, whose files may have any name; the stage goes from there to the user's (align/__init__.py).
EMPTY = Path(__file__).parent / "empty"


def python_path() -> str:
    """PYTHONPATH for a process in another folder: absolute paths, and this package's folder if the current one has it."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    searched = list(sys.path)
    if align.CURRENT_FOLDER in searched:
        searched.remove(align.CURRENT_FOLDER)
    others = [finder for finder in sys.meta_path if finder is not PathFinder]  # of packages in development, for one
    if PathFinder.find_spec("align", searched) is None and not any(each.find_spec("align", None) for each in others):
        paths.append(str(Path(__file__).parents[2]))
    return os.pathsep.join(paths)


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def raise_exit(signum: int, frame: Any) -> None:
    """A signal handler that unwinds the stack, so that child processes are ended."""
    raise SystemExit(128 + signum)


def launcher_environment() -> dict[str, str]:
    """Environment variables that keep DeepSpeed from warning in every process that it found only a CPU."""
    import torch

    return {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}


def run_process(words: list[str], environment: Mapping[str, str]) -> int:
    """Run a command in a process group of its own, no process of which outlives this call; returns its exit code."""
    environment = {**os.environ, PIPELINE: str(os.getpid()), **environment}
    folder = None
    if words[1:2] == ["-m"]:
        folder = EMPTY
        environment |= {align.FOLDER: os.getcwd(), "PYTHONPATH": python_path()}
    process = subprocess.Popen(words, env=environment, start_new_session=True, cwd=folder)
    ended = False
    try:
        code = process.wait()
        ended = code == 0
    finally:
        _end_group(process, patience=5 if ended else 0)
    return code


def _end_group(process: subprocess.Popen[bytes], patience: float) -> None:
    """End the rest of a process group: wait `patience` seconds, then SIGTERM, and finally SIGKILL."""
    for signum, seconds in ((0, patience), (signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                process.poll()  # reaps the leader, which would count as alive
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            continue
        return


def describe_exit_code(code: int) -> str:
    """An exit code in words; the launcher reports death by signal n as 256 - n, and shells and stages as 128 + n."""
    number = -code if code < 0 else 256 - code if code > 192 else code - 128
    name = signal.Signals(number).name if number in {*signal.Signals} else ""
    return f"was killed by {name}" if name else f"failed with exit code {code}"
