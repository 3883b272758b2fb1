"""What a stage leaves behind, and what it needs to go on after being killed.

An output folder holds, once the stage is finished, a plain Hugging Face model folder plus `stage.json`, the
manifest that the next stage reads. While the stage runs it holds `run.json` (the recipe it was started
with) and `checkpoint-N` folders, each of which counts only once `complete.json` lies in it. Everything
here is written under another name first and renamed, so a file or folder is whole or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.runs.files import difference, digest, fingerprints, sync, sync_tree, write_json

COMPLETE = "complete.json"
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside


def mark_complete(checkpoint: Path, state: Mapping[str, Any], save_total_limit: int) -> None:
    """Declare a checkpoint whole, then delete the oldest ones beyond `save_total_limit`. For rank 0, after all have written.

    `complete.json` appears once every file is on the disk. It holds `state`, the size and CRC-32 of each file, and how
    long the run's records (`*.jsonl` in the output folder) were.
    """
    output = checkpoint.parent
    records = list(output.glob("*.jsonl"))
    sync_tree(checkpoint)
    for record in records:
        sync(record)
    lengths = {record.name: record.stat().st_size for record in records}
    told = {**state, "records": lengths, "files": fingerprints(checkpoint)}
    told = json.loads(json.dumps(told, default=str))  # as it will be read back
    write_json(checkpoint / COMPLETE, {**told, "digest": digest(told)})
    sync(checkpoint)
    sync(output)
    rotate(output, save_total_limit)


def rotate(output_dir: str | Path, save_total_limit: int) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, apart from the one that the newest names as the best."""
    found = complete_checkpoints(output_dir)
    best = read_state(found[-1]).get("best_checkpoint") if found else None
    for old in [checkpoint for checkpoint in found[:-save_total_limit] if checkpoint.name != best]:
        (old / COMPLETE).unlink()  # first, so that a half-deleted folder is never taken for a checkpoint
        shutil.rmtree(old, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that was declared whole; None when all of it reads as it was written."""
    try:
        told = read_state(checkpoint)
        if told.pop("digest", None) != digest(told):
            return f"{COMPLETE} is not as it was written"
        return difference(checkpoint, told["files"])
    except ValueError:  # neither JSON nor UTF-8
        return f"{COMPLETE} cannot be read"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints in `output_dir` that were declared whole, oldest first."""
    found = [folder for folder in Path(output_dir).glob("checkpoint-*") if (folder / COMPLETE).is_file()]
    return sorted(found, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


def set_aside(checkpoint: Path) -> Path:
    """Take a damaged checkpoint out of the way; it is kept until the stage has finished. Returns its new place."""
    aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def clear_partial(output_dir: str | Path) -> None:
    """Delete what a killed run left half written."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    for folder in Path(output_dir).glob(".*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def cut_records(checkpoint: Path) -> None:
    """Shorten the run's records to what they were at a checkpoint: what came later is done again."""
    for name, size in read_state(checkpoint)["records"].items():
        path = checkpoint.parent / name
        if path.is_file() and path.stat().st_size > size:
            os.truncate(path, size)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `mark_complete` was given, and what it added."""
    state: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return state
