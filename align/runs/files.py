"""Atomic writes, fsync, and checksums of files and folders."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(paths: Iterable[Path]) -> None:
    """`sync` each of these."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(sync, paths):
            pass


def fingerprints(folder: Path, apart: Collection[str] = ()) -> dict[str, list[int]]:
    """Size and CRC-32 of every file in a folder, but those in its folders `apart`, by its path there."""
    paths = {name: path for name, path in _files(folder).items() if name.split("/")[0] not in apart}
    with ThreadPoolExecutor() as pool:  # reading and CRC-32 release the GIL
        return dict(zip(paths, pool.map(fingerprint, paths.values()), strict=True))


def difference(folder: Path, expected: dict[str, list[int]]) -> str | None:
    """The first difference of a folder from `expected` fingerprints; None without one. Other files are ignored.

    Raises:
        OSError: a file cannot be read.
    """
    found = _files(folder)
    for name, (size, _) in expected.items():  # first what needs no reading
        if name not in found:
            return f"{name} is {'a symbolic link' if (folder / name).is_symlink() else 'missing'}"
        if (length := found[name].stat().st_size) != size:
            return f"{name} has {length} bytes, not {size}"
    with ThreadPoolExecutor() as pool:
        actual = dict(zip(expected, pool.map(fingerprint, (found[name] for name in expected)), strict=True))
    changed = [name for name in expected if actual[name] != expected[name]]
    return f"{changed[0]} has other bytes than were written" if changed else None


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def fingerprint(path: Path, length: int | None = None) -> list[int]:
    """Size and CRC-32 of a file, or of its first `length` bytes."""
    # CRC-32 finds accidents as well as SHA-256 does, which guards against forgery at 2.6 times the time.
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20 if length is None else min(1 << 20, length - size)):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def follow_umask(paths: Iterable[Path]) -> None:
    """Give saved weights the permissions of other files; safetensors makes its files readable by their owner alone."""
    for path in paths:
        path.chmod(_usual_mode())


@functools.cache
def _usual_mode() -> int:
    os.umask(mask := os.umask(0o077))
    return 0o666 & ~mask


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash, of the machine too, it has its old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.align-{secrets.token_hex(6)}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:  # a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NaN and infinities, which JSON does not have, as null."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(value), indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def finite(value: Any) -> Any:
    """`value` as JSON gives it back, with null for NaN and infinities."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def digest(value: Any) -> str:
    """Short SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
