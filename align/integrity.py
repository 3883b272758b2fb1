"""Whether a folder is on the disk, and still as it was written."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or the names in a folder, before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything in a folder, and the folder."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(sync, [*folder.rglob("*"), folder]):
            pass


def fingerprints(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file in a folder, by its path there."""
    paths = _files(folder)
    with ThreadPoolExecutor() as pool:  # reading and CRC-32 leave Python to other threads
        return dict(zip(paths, pool.map(_fingerprint, paths.values()), strict=True))


def difference(folder: Path, expected: dict[str, list[int]]) -> str | None:
    """What is wrong in a folder whose `fingerprints` were once `expected`; None when nothing is. Files may have come.

    Raises:
        OSError: a file cannot be read.
    """
    found = _files(folder)
    for name, (size, _) in expected.items():  # what costs no reading comes first
        if name not in found:
            return f"{name} is missing"
        if (actual := found[name].stat().st_size) != size:
            return f"{name} has {actual} bytes, not {size}"
    actual_sums = fingerprints(folder)
    changed = [name for name in expected if actual_sums[name] != expected[name]]
    return f"{changed[0]} has other bytes than were written" if changed else None


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _fingerprint(path: Path) -> list[int]:
    # CRC-32 finds accidents as well as SHA-256 does, which guards against forgery at 2.6 times the time.
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
