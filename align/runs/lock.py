"""One run at a time in a folder: the lock file `run.lock`, which names the owner.

Every process of a run holds an flock on it, so that the lock ends with the last of them, however it ends. What is written in
it is for people, and for file systems and machines that flock does not reach across; there a heartbeat says that the run
lives (`align/runs/heartbeat.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align.errors import UserError
from align.runs import heartbeat
from align.runs.lock_record import LOCK, describe_owner, heartbeat_period, in_use, is_alive, is_here, myself, read
from align.terminal import say

PATIENCE = 3.0  # seconds: the ranks of a killed launcher end within one
NO_FLOCK = 0.5  # seconds after which of several that took a lock at once, where there is no flock, only the last lives
SETTLED = 1.5  # periods of the heartbeat after which of several that took a lock over at once only the last lives


@dataclass(frozen=True, eq=False)
class Held:
    """A lock that this process holds, alone or with the other ranks."""

    folder: Path
    descriptor: int
    stop_heartbeat: Callable[[], None]


_held: set[Held] = set()


def acquire(folder: Path, wait: bool = True) -> Held:
    """Make `folder`, and hold its lock until `release`; one that a dead run left behind is taken over.

    Args:
        wait: for a heartbeat of a run on another machine, a minute if there is none; otherwise it counts as alive.

    Raises:
        UserError: another run has it, or may have it on another machine.
        OSError: the folder cannot be made or written to.
    """
    deadline = time.monotonic() + PATIENCE
    pulse = heartbeat.Pulse() if wait else None
    made: os.stat_result | None = None  # the lock file, if it was made here
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, is_new = _open(folder)
        try:
            made = os.fstat(descriptor) if is_new and descriptor is not None else made
            mine = descriptor is not None and made is not None and os.path.samestat(made, os.fstat(descriptor))
            if descriptor is not None and _take(folder, descriptor, time.monotonic() > deadline, pulse, mine):
                return _hold(folder, descriptor)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        if descriptor is not None:
            os.close(descriptor)
        time.sleep(0.05 if time.monotonic() < deadline else 0.5)


def share(folder: Path) -> Held | None:
    """Hold the lock that rank 0 has acquired, on another rank: the folder is free once no rank lives. None without a lock.

    Raises:
        UserError: another run has it.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None  # another node that sees the file later, or does not share the folder, which is checked elsewhere
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            _flock(descriptor, fcntl.LOCK_SH)
        except BlockingIOError:
            if time.monotonic() < deadline:  # another start has it for a moment, to see whether this run is alive
                time.sleep(0.05)
                continue
            owner = read(folder)
            os.close(descriptor)
            raise in_use(folder, owner) from None
        return _hold(folder, descriptor)


def release(held: Held, delete: bool) -> None:
    """Release the lock.

    Args:
        delete: also the file, as rank 0 does.
    """
    held.stop_heartbeat()
    _held.discard(held)
    if delete and _is_current(held.folder, held.descriptor):
        (held.folder / LOCK).unlink()
    os.close(held.descriptor)


def release_all() -> None:
    """Release all locks of this process, which is about to end; the last rank on the machine of rank 0 deletes the file."""
    for held in [*_held]:
        with contextlib.suppress(UserError, OSError):
            mine = read(held.folder) or {}
            if mine and is_here(mine):
                # Of two ranks that try at once, the second gets the lock: trying has taken it from the first.
                alone = _flock(held.descriptor, fcntl.LOCK_EX) or mine["pid"] == os.getpid()
                if alone and _is_current(held.folder, held.descriptor):
                    (held.folder / LOCK).unlink()


def remove_stale(folder: Path) -> None:
    """Delete the lock of a run whose processes have all been killed, if there is one."""
    if (folder / LOCK).is_file():
        with contextlib.suppress(UserError, OSError):
            release(acquire(folder, wait=False), delete=True)


def _open(folder: Path) -> tuple[int | None, bool]:
    """The lock file, opened, and whether this call made it, which of all machines one alone does; None to try again."""
    for flags in (os.O_CREAT | os.O_EXCL, 0):
        with contextlib.suppress(
            FileExistsError, FileNotFoundError
        ):  # its owner may just have deleted it, or the folder
            return os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | flags, 0o644), bool(flags)
    return None, False


def _hold(folder: Path, descriptor: int) -> Held:
    owner = read(folder)

    def check() -> None:
        """End this process if another run has taken over the folder, as when this one was suspended for minutes."""
        with contextlib.suppress(UserError, OSError):
            if owner and (now := read(folder)) and now != owner:
                say(
                    f"error: output_dir: {folder} was taken over by {describe_owner(now)}, since this run had shown no sign of life; it ends."
                )
                os._exit(2)

    held = Held(folder, descriptor, heartbeat.beat(folder / LOCK, check))
    _held.add(held)
    return held


def _take(folder: Path, descriptor: int, last_try: bool, pulse: heartbeat.Pulse | None, made_here: bool) -> bool:
    """Try once; False to try again."""
    try:
        reliable = _flock(descriptor, fcntl.LOCK_EX)
    except BlockingIOError:
        if last_try:
            raise in_use(folder, read(folder)) from None
        return False
    if not _is_current(folder, descriptor):  # deleted by its owner between opening and locking
        return False
    owner, period = read(folder), 0.0
    if not owner and not made_here and not last_try:
        return False  # whoever made it is about to write its name, on a machine that flock does not reach perhaps
    if owner and is_alive(owner, reliable):
        if pulse is None or not (period := heartbeat_period(owner)):
            if last_try:
                raise in_use(folder, owner)
            return False
        seconds = heartbeat.SILENCE * period
        if pulse.is_new():
            say(
                f"{folder}: is in use by {describe_owner(owner)}; waiting up to {seconds:.0f} s for a sign of life of that run"
            )
        # This opening of the file has asked a network file system for its time, which might be cached otherwise.
        alive = pulse.observe((owner, os.fstat(descriptor).st_mtime_ns), period)
        if alive:
            raise in_use(folder, owner, alive=True)
        if alive is None:
            return False
        say(f"{folder}: that run has shown no sign of life for {seconds:.0f} s; its lock is taken over")
    mine = myself()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(mine) + "\n").encode(), 0)
    os.fsync(descriptor)
    try:
        _flock(descriptor, fcntl.LOCK_SH)  # for the other ranks
    except BlockingIOError:  # from exclusive to shared is no single step
        return False
    if period or not reliable:
        # A third machine may have waited as long, and have written its name over ours, or before us, and started: then it ends
        # at its next heartbeat.
        time.sleep(SETTLED * period or NO_FLOCK)
        if (now := read(folder)) != mine:
            raise in_use(folder, now, alive=True)
    return True


def _flock(descriptor: int, flags: int) -> bool:
    """Lock without waiting; False where the file system has no such locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(descriptor, flags | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_current(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(folder / LOCK), os.fstat(descriptor))
    except FileNotFoundError:
        return False
