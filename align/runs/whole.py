"""Whether all that a finished run has written for later stages is still in its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from align.config.ensemble import JUDGE, NUMBERED
from align.errors import OtherRun, UserError
from align.models.safetensors_header import read_header
from align.runs.fingerprints import MODEL_SUFFIXES, NOT_OF_THE_MODEL
from align.runs.own_files import MANIFEST
from align.runs.records import read_record
from align.runs.schemas import MANIFEST_RECORD


def check_whole(folder: Path, files: Iterable[str], outer: Path | None = None) -> None:
    """Check that a finished run's models and data sets are there, and no weights are cut; also of the models inside.

    Checkpoints, logs, pages and charts may have been deleted.

    Args:
        files: what the run has written, from its record.
        outer: for a model inside, the folder of the finished stage, which alone can be run again.

    Raises:
        OtherRun: names the first that is missing or cut.
    """
    for name in sorted(files):
        path = folder / name
        if is_inside := name == JUDGE or NUMBERED.fullmatch(name) is not None:
            path /= MANIFEST
        elif path.suffix not in {*MODEL_SUFFIXES, ".jsonl"} or path.name in NOT_OF_THE_MODEL:
            continue
        if not os.path.lexists(path):
            raise OtherRun(
                f"output_dir: {folder} is finished, but {path} is missing; put it back from a copy, or delete "
                f"{outer or folder} to run the stage again."
            )
        if is_inside:
            check_whole(path.parent, read_record(path, MANIFEST_RECORD).get("files", []), outer or folder)
        elif path.suffix == ".safetensors":
            try:
                read_header(path, "output_dir")
            except UserError as error:
                raise OtherRun(str(error)) from None
