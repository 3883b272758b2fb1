"""Checkpoints of a run, each of which is complete or does not count.

While a stage runs, its output folder holds `run.json` (the recipe it was started with) and `checkpoint-N` folders, each
of which counts only once it contains `complete.json`. Once the stage is finished, the folder is a plain Hugging Face
model folder with the manifest `stage.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.runs.files import difference, digest, fingerprints, sync, sync_tree, write_json

if TYPE_CHECKING:
    from align.engine.distributed import World

COMPLETE = "complete.json"
VERSION = 2  # of the files in a checkpoint; the first held DeepSpeed's pickles
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside


def mark_complete(
    checkpoint: Path, state: Mapping[str, Any], save_total_limit: int, world: World, sums: Mapping[str, list[int]]
) -> None:
    """Declare a checkpoint complete, then delete the oldest beyond `save_total_limit`. For all ranks.

    `complete.json` appears once every rank's files are on the disk. It holds `state`, the size and CRC-32 of each file,
    and how long the run's records (`*.jsonl` in the output folder) were.

    Args:
        sums: size and CRC-32 of each file that this rank has written and synced, by its path in the checkpoint; no rank
            reads the files of another.
    """
    files: dict[str, list[int]] = {}
    for theirs in world.gather_text(json.dumps(dict(sums))):  # also waits for them
        files |= json.loads(theirs)
    if not world.is_main:
        return
    output = checkpoint.parent
    records = list(output.glob("*.jsonl"))
    for path in (*(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint, *records):
        sync(path)
    lengths = {record.name: record.stat().st_size for record in records}
    recorded = {**state, "version": VERSION, "records": lengths, "files": dict(sorted(files.items()))}
    recorded = json.loads(json.dumps(recorded, default=str))  # as it will be read back
    write_json(checkpoint / COMPLETE, {**recorded, "digest": digest(recorded)})
    sync(output)
    rotate(output, save_total_limit)


def synced_sums(checkpoint: Path, apart: Collection[str] = ()) -> dict[str, list[int]]:
    """Sync all files of a checkpoint; returns the size and CRC-32 of each, by its path.

    Args:
        apart: folders in it that other ranks write to, and are left out.
    """
    sync_tree(checkpoint)
    return fingerprints(checkpoint, apart)


def rotate(output_dir: str | Path, save_total_limit: int) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, apart from the one that the newest names as the best."""
    found = complete_checkpoints(output_dir)
    best = read_state(found[-1]).get("best_checkpoint") if found else None
    for old in [checkpoint for checkpoint in found[:-save_total_limit] if checkpoint.name != best]:
        (old / COMPLETE).unlink()  # first, so that a half-deleted folder is never taken for a checkpoint
        shutil.rmtree(old, ignore_errors=True)


def find_corruption(checkpoint: Path) -> str | None:
    """What is corrupt in a complete checkpoint; None when every file has the bytes that were written."""
    try:
        state = read_state(checkpoint)
        if state.pop("digest", None) != digest(state):
            return f"{COMPLETE} does not match its checksum"
        return difference(checkpoint, state["files"])
    except ValueError:  # neither JSON nor UTF-8
        return f"{COMPLETE} cannot be read"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, oldest first."""
    found = [folder for folder in Path(output_dir).glob("checkpoint-*") if (folder / COMPLETE).is_file()]
    return sorted(found, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, which is kept until the stage has finished; returns its new path."""
    aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def clear_partial(output_dir: str | Path) -> None:
    """Delete what a killed run wrote in part."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    for folder in Path(output_dir).glob(".*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def cut_records(checkpoint: Path) -> None:
    """Truncate the run's records (`*.jsonl`) to their length at a checkpoint: later steps are done again."""
    for name, size in read_state(checkpoint)["records"].items():
        path = checkpoint.parent / name
        if path.is_file() and path.stat().st_size > size:
            os.truncate(path, size)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `mark_complete` was given, with the records and files that it added."""
    state: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return state
