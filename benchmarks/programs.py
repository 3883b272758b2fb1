"""Run the programs to measure, and report the results."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


def run(words: list[str], threads: int) -> tuple[str, int]:
    """Run a command; returns its standard output, and the peak resident memory in bytes of its largest process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(words, stdout=output, stderr=errors, env=environment, cwd=ROOT)
        peak = 0
        while process.poll() is None:  # getrusage of a child starts from its parent's memory
            with contextlib.suppress(psutil.Error):
                peak = max(peak, *(peak_memory(child.pid) for child in [process, *process.children(recursive=True)]))
            time.sleep(0.05)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(words)} failed:\n{output.read()[-2000:]}\n{errors.read()[-2000:]}")
        return output.read(), peak


def peak_memory(pid: int) -> int:
    """Peak resident memory of a process so far, in bytes; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def free_port() -> int:
    """A free port for the launcher, whose default is the same for all runs on a machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def report(results: dict[str, Any], path: str | None) -> None:
    """Write the results as JSON to a file, or print them."""
    text = json.dumps(results, indent=2)
    if path:
        Path(path).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
