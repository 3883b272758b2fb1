"""Commands in forked processes, each of which can be killed just before a chosen write.

The process that calls `run` has imported the libraries and `align`, and has no threads: a fork of it starts in
milliseconds. Writes are counted by Python's audit events and at the two functions whose C code raises none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

CPU_SECONDS = 20  # that a process may use: on a busy machine the clock says little
IDLE_SECONDS = 12  # in which no process of a command uses any
MEMORY = 6 << 30  # bytes beyond what the fork begins with
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}

LAUNCHER = {"rank": "RANK", "local": "LOCAL_RANK", "size": "WORLD_SIZE"}  # the variables of torchrun and DeepSpeed


class Ended(NamedTuple):
    """How the processes of a command ended. An exit code of None: it had not ended by itself in time."""

    codes: list[int | None]
    out: str
    err: str
    seconds: float

    @property
    def code(self) -> int | None:
        """That of the command: the first that is not 0."""
        return next((code for code in self.codes if code != 0), 0)


class Stop(NamedTuple):
    """Send a signal to one rank just before a write in its working directory: the n-th (from 1), or the first of a file's name."""

    write: int | str
    rank: int = 0
    signum: int = signal.SIGKILL


def run(
    words: Sequence[str], folder: Path, log: Path, *, ranks: int = 1, names: Mapping[str, str] = LAUNCHER, env: Mapping[str, str] = {}, seconds: float = 180,
    stop: Stop | None = None, together: bool = True, before: Callable[[], object] | None = None,
    meanwhile: Callable[[int], object] | None = None,
) -> Ended:  # fmt: skip
    """`align WORDS` in `folder`, and wait.

    Args:
        names: of the environment variables that tell a rank its place.
        log: start of the names of the files that output and writes are recorded in.
        seconds: after which what is left is killed, as it is when it uses no CPU time for `IDLE_SECONDS`.
        together: whether the other ranks are ended when one fails, as launchers do.
        before: called in each process, before the command.
        meanwhile: called with the first process's id while it runs.
    """
    began = time.monotonic()
    places: list[dict[str, str]] = [{}]
    if ranks > 1:
        port = str(_free_port())
        places = [
            {names["rank"]: str(rank), names["local"]: str(rank), names["size"]: str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for rank in range(ranks)
        ]  # fmt: skip
    pids: list[int] = []
    for rank, place in enumerate(places):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                _child(
                    words,
                    folder,
                    Path(f"{log}{rank}"),
                    {**env, **place},
                    stop if stop and stop.rank == rank else None,
                    before,
                )
            finally:
                os._exit(99)
        pids.append(pid)
    codes: dict[int, int | None] = {}
    deadline = began + seconds
    asked = False  # the other ranks to end
    used, since, looked = 0.0, began, began  # CPU time of all processes, since when, and when it was last looked at
    while len(codes) < len(pids):
        for pid in [each for each in pids if each not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        left = [pid for pid in pids if pid not in codes]
        if left and time.monotonic() > looked + 1:
            looked, before_that, used = time.monotonic(), used, _cpu_seconds(left)
            since = looked if used != before_that else since
        if left and (time.monotonic() > deadline or looked > since + IDLE_SECONDS):
            _end(left, signal.SIGKILL)
            codes |= dict.fromkeys(left) if not asked else dict.fromkeys(left, -9)
        elif left and together and not asked and any(codes.values()):
            _end(left, signal.SIGTERM)
            asked, deadline = True, min(deadline, time.monotonic() + 10)
        elif left:
            if meanwhile is not None:
                meanwhile(pids[0])
            time.sleep(0.005)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # children of its own
    out, err = ("".join(_read(Path(f"{log}{rank}.{kind}")) for rank in range(ranks)) for kind in ("out", "err"))
    return Ended([codes[pid] for pid in pids], out, err, time.monotonic() - began)


def writes(log: Path, rank: int = 0) -> list[str]:
    """The writes of the last command with this log: `event path`, relative to its working directory."""
    return _read(Path(f"{log}{rank}.writes")).splitlines()


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape") if path.exists() else ""


def _end(pids: Sequence[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
    if signum == signal.SIGKILL:
        for pid in pids:
            os.waitpid(pid, 0)


def _cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that processes and their children have used."""
    used = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(pid)
            for each in [own, *own.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    used += sum(each.cpu_times()[:2])
    return used


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _child(
    words: Sequence[str], folder: Path, log: Path, env: Mapping[str, str], stop: Stop | None, before: Callable[[], object] | None
) -> None:  # fmt: skip
    code = 1
    try:
        os.setsid()
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        for descriptor, kind in ((1, "out"), (2, "err")):
            file = os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        os.environ.update(env, TMPDIR=str(folder.parent))
        tempfile.tempdir = None
        os.chdir(folder)
        sys.argv = ["align", *words]
        sys.dont_write_bytecode = True
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _count_writes(os.getcwd(), os.open(f"{log}.writes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stop)
        if before is not None:
            before()
        from align.__main__ import main

        code = main(list(words))
    except SystemExit as ended:  # what Python does at the end of a program
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if 0 <= code < 256 else 1)


def _confined(folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that fails writes outside of the case, as a disk without permission would: bad input may name any place."""
    allowed = tuple(
        os.path.join(os.path.realpath(each), "") for each in (folder, os.environ["HF_HOME"], "/dev", "/proc/self")
    )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            paths = args[:1]
        elif event in CHANGES:
            paths = args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]
        else:
            return
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                if not os.path.join(os.path.realpath(parent), name).startswith(allowed):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fsdecode(path))

    return hook


def _count_writes(folder: str, record: int, stop: Stop | None) -> None:
    """Record each write below `folder`, and end at the one that `stop` names."""
    count = 0
    inside = os.path.join(folder, "")

    def wrote(event: str, path: Any) -> None:
        nonlocal count
        try:
            place = os.path.abspath(os.fsdecode(path))
        except TypeError:  # a file descriptor
            return
        if not place.startswith(inside):
            return
        count += 1
        os.write(record, f"{event} {place[len(inside) :]}\n".encode(errors="replace"))
        if stop is not None and (
            count == stop.write or (isinstance(stop.write, str) and stop.write in os.path.basename(place))
        ):
            os.kill(os.getpid(), stop.signum)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if path is not None and isinstance(flags, int) and flags & WRITES:
                wrote("open", path)
        elif event in CHANGES:
            wrote(event, args[0])

    sys.addaudithook(hook)
    sys.addaudithook(_confined(Path(folder).parent))
    import safetensors.torch
    import torch

    def around(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            path = args[place] if len(args) > place else kwargs.get("f", kwargs.get("filename"))
            if not isinstance(path, str | os.PathLike):
                return write(*args, **kwargs)
            wrote("begin", path)
            returned = write(*args, **kwargs)
            if stop is not None and count + 1 == stop.write and Path(path).is_file():
                os.truncate(path, os.path.getsize(path) // 2)  # counts as the next write: in the middle of this file
            wrote("end", path)
            return returned

        return wrapper

    torch.save = around(torch.save, 1)
    safetensors.torch.serialize_file = around(safetensors.torch.serialize_file, 1)
