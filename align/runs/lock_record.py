"""The content of a lock file: which process on which machine holds the folder, and whether it is still alive."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.runs import heartbeat

LOCK = "run.lock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells machines apart that have one name


def read(folder: Path) -> dict[str, Any] | None:
    """The content of the lock file: `host`, `boot`, `pid`, `started`, `since`, `command` and `heartbeat`; {} for an empty one, None for none.

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
        raise UserError(f"output_dir: {path} is not the lock of a run; move it elsewhere, or choose another folder.")
    return found


def myself() -> dict[str, Any]:
    import psutil  # comes with deepspeed and accelerate

    return {
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "heartbeat": heartbeat.PERIOD,
    }


def boot_id() -> str:
    """The kernel's id of this boot, "" where there is none."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock runs, or ran, on this machine since it was last started; several may have one name."""
    return bool(owner["host"] == socket.gethostname() and owner.get("boot", "") in ("", boot_id()))


def is_alive(owner: dict[str, Any], reliable: bool) -> bool:
    """Whether the owner of a lock may still run, given that no process of this machine holds it by flock.

    Args:
        reliable: whether the file system has flock at all.
    """
    import psutil

    if not is_here(owner):
        # Containers of one machine have names of their own, and process numbers too.
        return not (reliable and owner.get("boot") and owner["boot"] == boot_id())
    if owner["pid"] == os.getpid():
        return False  # from an attempt just before this one
    try:
        process = psutil.Process(int(owner["pid"]))
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and abs(process.create_time() - float(owner.get("started", 0.0))) < 1.0
    except (psutil.Error, ValueError, TypeError):
        return False


def heartbeat_period(owner: dict[str, Any]) -> float:
    """Seconds between the heartbeats of a run on another machine; 0 if it has none."""
    period = owner.get("heartbeat")
    if is_here(owner) or not isinstance(period, int | float) or not 0 < period <= 60:
        return 0.0
    return period


def describe_owner(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"


def in_use(folder: Path, owner: dict[str, Any] | None, alive: bool = False) -> UserError:
    """The error for a folder of another run.

    Args:
        alive: whether it is known to be, on another machine.
    """
    if not owner:
        return UserError(
            f"output_dir: another run has just started in {folder}; wait for it, or choose another folder."
        )
    holder = f"output_dir: {folder} is in use by {describe_owner(owner)}"
    if is_here(owner):
        return UserError(f"{holder}; wait until all its ranks have ended, or choose another folder.")
    if alive:
        return UserError(f"{holder}, another machine than this one; wait until it has ended, or choose another folder.")
    return UserError(
        f"{holder}, another machine than this one; if that run is gone, delete {folder / LOCK} and start again."
    )
