"""The file of samples of an unfinished run, one line for each batch, from which a killed run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.config.json_file import parse_json, read_file
from align.engine.faults import during, removed
from align.errors import BadFile
from align.runs.files import digest, write_bytes
from align.terminal import say


@dataclass(frozen=True, slots=True)
class Sample:
    """One response and its scores.

    Attributes:
        ids: token ids, up to and including what ends the response.
        ended: whether it ends by itself rather than at `response_length`.
        score: the score by which the best is chosen.
        sources: the score of each reward source; None if a source does not apply.
        judge: the judge's score; None without a judge.
    """

    ids: list[int]
    ended: bool
    score: float
    sources: list[float | None]
    judge: float | None


class SampleFile:
    """The file of finished batches. A line is valid if its digest, which includes `key`, matches.

    Args:
        key: a digest of everything that determines the samples; samples with another key are discarded.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> list[Sample]:
        """Read the samples up to the first missing or damaged batch, and truncate the file there."""
        samples: list[Sample] = []
        if not os.path.lexists(self.path):
            return samples
        lines = read_file(self.path, follow_links=False, max_bytes=os.lstat(self.path).st_size).splitlines(
            keepends=True
        )
        valid_lines = 0
        for line in lines:
            try:
                batch = parse_json(line, self.path)
            except BadFile:
                batch = None
            rows = batch["rows"] if isinstance(batch, dict) and isinstance(batch.get("rows"), list) else []
            if not rows or not line.endswith(b"\n") or batch != self._line(len(samples), rows):
                say(
                    f"{self.path}: sampling again from response {len(samples) + 1}, whose line is damaged or of another run"
                )
                break
            samples += [Sample(**row) for row in rows]
            valid_lines += 1
        if valid_lines < len(lines):
            write_bytes(self.path, b"".join(lines[:valid_lines]))
        return samples

    def append(self, start: int, batches: Sequence[Sequence[Sample]]) -> None:
        """Append consecutive batches, the first of which begins at sample `start`."""
        if not self.path.parent.is_dir():
            raise removed(self.path.parent.parent)
        with during("records", self.path), open(self.path, "ab") as file:
            for batch in batches:
                line = self._line(start, [asdict(sample) for sample in batch])
                file.write(json.dumps(line).encode() + b"\n")
                start += len(batch)
            file.flush()
            os.fsync(file.fileno())

    def _line(self, start: int, rows: Any) -> dict[str, Any]:
        return {"start": start, "rows": rows, "digest": digest([self.key, start, rows])}
