"""Limits on the expansion of compressed files: a gzip or Parquet file of a megabyte can expand to gigabytes."""

from __future__ import annotations

import gzip
import os
from typing import Any

from align.errors import UserError

MAX_EXPANDED = 2**30  # bytes or characters; files that expand to less are read whatever their size
MAX_RATIO = 200  # of these to the bytes of the file; text has 3 to 20


class BoundedGzip(gzip.GzipFile):
    """A gzip file that is read; raises UserError once it has expanded too far."""

    expanded = 0

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        return self._counted(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        return self._counted(super().read1(size))

    def _counted(self, found: bytes) -> bytes:
        self.expanded += len(found)
        check_expansion(str(self.name), self.expanded)
        return found


def check_expansion(file: str, expanded: int) -> None:
    """Check how much of a file has been read.

    Raises:
        UserError: it expands to far more than text does.
    """
    if expanded > MAX_EXPANDED and expanded > MAX_RATIO * os.path.getsize(file):
        raise UserError(
            f"{file}: expands to more than {MAX_EXPANDED:,} characters, {MAX_RATIO} times its size, as no text does; if it "
            "is meant, save it as JSON lines without compression."
        )


def characters(value: Any) -> int:
    """The characters of all text in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 1
