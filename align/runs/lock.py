"""One run at a time in a folder: the lock file `run.lock`, which says who runs there.

Every process of a run holds an flock on it, so that the lock ends with the last of them, however it ends. What is written in
it is for people, and for file systems and machines that flock does not reach across.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from align.errors import UserError

LOCK = "run.lock"
PATIENCE = 3.0  # seconds: the ranks of a killed launcher end within one
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells machines apart that have one name


def acquire(folder: Path) -> int:
    """Make `folder`, and hold its lock until `release` of what this returns; one that a dead run left behind is taken over.

    Raises:
        UserError: another run has it, or may have it on another machine.
        OSError: the folder cannot be made or written to.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(folder)
        try:
            if descriptor is not None and _take(folder, descriptor, last_try=time.monotonic() > deadline):
                return descriptor
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        if descriptor is not None:
            os.close(descriptor)
        time.sleep(0.05)


def share(folder: Path) -> int | None:
    """Hold the lock that rank 0 has acquired, on another rank: the folder is free once no rank lives. None without a lock.

    Raises:
        UserError: another run has it.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None  # another node that sees the file later, or does not share the folder, which is checked elsewhere
    try:
        _flock(descriptor, fcntl.LOCK_SH)
    except BlockingIOError:
        owner = read(folder)
        os.close(descriptor)
        raise _in_use(folder, owner) from None
    return descriptor


def release(folder: Path, descriptor: int, delete: bool) -> None:
    """Give the lock up.

    Args:
        delete: also the file, as rank 0 does.
    """
    if delete and _is_current(folder, descriptor):
        (folder / LOCK).unlink()
    os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Delete the lock of a run whose processes have all been killed, if there is one."""
    if (folder / LOCK).is_file():
        with contextlib.suppress(UserError, OSError):
            release(folder, acquire(folder), delete=True)


def read(folder: Path) -> dict[str, Any] | None:
    """What the lock file says: `host`, `boot`, `pid`, `started`, `since` and `command`; {} for an empty one, None for none.

    Raises:
        UserError: there is a file of that name that is no lock.
    """
    path = folder / LOCK
    if not os.path.lexists(path):
        return None
    found: Any = None
    try:
        if path.is_file() and not path.is_symlink():
            text = path.read_text(encoding="utf-8")
            found = json.loads(text) if text else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or (found and not {"host", "pid", "since", "command"} <= found.keys()):
        raise UserError(f"output_dir: {path} is no lock of a run; move it elsewhere, or choose another folder.")
    return found


def _open(folder: Path) -> int | None:
    try:
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:  # its owner has just deleted the folder
        return None


def _take(folder: Path, descriptor: int, last_try: bool) -> bool:
    """Try once; False to try again."""
    try:
        reliable = _flock(descriptor, fcntl.LOCK_EX)
    except BlockingIOError:
        if last_try:
            raise _in_use(folder, read(folder)) from None
        return False
    if not _is_current(folder, descriptor):  # deleted by its owner between opening and locking
        return False
    owner = read(folder)
    if owner and _is_alive(owner, reliable):
        if last_try:
            raise _in_use(folder, owner)
        return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(_myself()) + "\n").encode(), 0)
    os.fsync(descriptor)
    try:
        _flock(descriptor, fcntl.LOCK_SH)  # for the other ranks
    except BlockingIOError:  # from exclusive to shared is no single step
        return False
    return True


def _flock(descriptor: int, how: int) -> bool:
    """Lock without waiting; False where the file system has no such locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
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


def _myself() -> dict[str, Any]:
    import psutil  # comes with deepspeed and accelerate

    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _boot() -> str:
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _is_alive(owner: dict[str, Any], reliable: bool) -> bool:
    """Whether the owner of a lock may still run, given that no process of this machine holds it by flock.

    Args:
        reliable: whether the file system has flock at all.
    """
    import psutil

    if owner["host"] != socket.gethostname():
        # Containers of one machine have names of their own, and process numbers too.
        return not (reliable and owner.get("boot") and owner["boot"] == _boot())
    if owner["pid"] == os.getpid():
        return False  # from an attempt just before this one
    try:
        process = psutil.Process(int(owner["pid"]))
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and abs(process.create_time() - float(owner.get("started", 0.0))) < 1.0
    except (psutil.Error, ValueError, TypeError):
        return False


def _in_use(folder: Path, owner: dict[str, Any] | None) -> UserError:
    if not owner:
        return UserError(
            f"output_dir: another run has just started in {folder}; wait for it, or choose another folder."
        )
    who = f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
    if owner["host"] == socket.gethostname():
        return UserError(
            f"output_dir: {folder} is in use by {who}; wait until all its ranks have ended, or choose another folder."
        )
    return UserError(
        f"output_dir: {folder} is in use by {who}, another machine than this one; if that run is gone, delete "
        f"{folder / LOCK} and start again."
    )
