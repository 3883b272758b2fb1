"""Checkpoints of a run; incomplete ones are ignored.

While a stage runs, its output folder holds `run.json` (the recipe it was started with) and `checkpoint-N` folders, each
of which counts only once it contains `complete.json`. Once the stage is finished, the folder is a plain Hugging Face
model folder with the manifest `stage.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.ensemble import JUDGE, NUMBERED
from align.errors import BadFile
from align.runs.files import (
    difference,
    digest,
    fingerprint,
    fingerprints,
    finite,
    follow_umask,
    sync,
    sync_all,
    write_bytes,
    write_json,
)
from align.runs.own_files import MANIFEST, delete, own, owned
from align.runs.records import CHECKPOINT_NAME, read_record
from align.runs.schemas import COMPLETE, COMPLETE_RECORD, METRICS, SAMPLES

if TYPE_CHECKING:
    from align.engine.distributed import World

VERSION = 2  # of the files in a checkpoint; the first held DeepSpeed's pickles
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside


def mark_complete(
    checkpoint: Path, state: Mapping[str, Any], save_total_limit: int, world: World, sums: Mapping[str, list[int]]
) -> None:
    """Declare a checkpoint complete, then delete the oldest beyond `save_total_limit`. Every rank must call it.

    `complete.json` appears once every rank's files are on the disk. It holds `state`, the size and CRC-32 of each file,
    and size and CRC-32 of the run's records, `metrics.jsonl` and `samples.jsonl`.

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
    records = [path for name in sorted({METRICS, SAMPLES} & owned(output)) if (path := output / name).is_file()]
    for path in (*(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint, *records):
        sync(path)
    sums_of_records = {record.name: fingerprint(record) for record in records}
    recorded = finite({**state, "version": VERSION, "records": sums_of_records, "files": dict(sorted(files.items()))})
    write_json(checkpoint / COMPLETE, {**recorded, "digest": digest(recorded)})
    sync(output)
    rotate(output, save_total_limit)


def synced_sums(checkpoint: Path, apart: Collection[str] = ()) -> dict[str, list[int]]:
    """Sync all files of a checkpoint; returns the size and CRC-32 of each, by its path.

    Args:
        apart: folders in it that other ranks write to, and are left out.
    """
    sums = fingerprints(checkpoint, apart)
    follow_umask(checkpoint / name for name in sums if name.endswith(".safetensors"))
    sync_all(checkpoint / name for name in sums)  # not of other ranks, which may not be done yet
    return sums


def rotate(output_dir: str | Path, save_total_limit: int) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, apart from the one that the newest names as the best."""
    found = complete_checkpoints(output_dir)
    best = read_state(found[-1]).get("best_checkpoint") if found else None
    for old in [checkpoint for checkpoint in found[:-save_total_limit] if checkpoint.name != best]:
        delete_checkpoint(old)


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, whole, damaged or written in part; what others have put into it is kept."""
    mine: set[str] | None = None
    if not checkpoint.is_symlink():
        with contextlib.suppress(BadFile):  # then its files are unknown
            mine = {COMPLETE, *read_state(checkpoint)["files"]}
        with contextlib.suppress(OSError):
            (checkpoint / COMPLETE).unlink()  # first, so that a half-deleted folder is never taken for a checkpoint
    delete(checkpoint, mine)


def find_corruption(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is corrupt in a complete checkpoint; None when every file has the bytes that were written.

    Args:
        rank, ranks: each rank reads its share of the files.
    """
    try:
        state = read_state(checkpoint)
        if state.pop("digest") != digest(state):
            return f"{COMPLETE} does not match its checksum"
        if state["step"] != step_of(checkpoint):
            return f"{COMPLETE} is of step {state['step']}"
        largest_first = sorted(state["files"].items(), key=lambda file: -file[1][0])
        return difference(checkpoint, dict(largest_first[rank::ranks]))
    except BadFile as error:
        return str(error).removeprefix(f"{checkpoint}{os.sep}")
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of the run in `output_dir`, oldest first; links are none."""
    mine = [Path(output_dir) / name for name in owned(output_dir) if CHECKPOINT_NAME.fullmatch(name)]
    return sorted((each for each in mine if not each.is_symlink() and os.path.lexists(each / COMPLETE)), key=step_of)


def models_inside(folder: str | Path) -> list[Path]:
    """The folders of the run's own in `folder` for the members of an ensemble and for a judge, finished or not."""
    return [Path(folder) / name for name in sorted(owned(folder)) if name == JUDGE or NUMBERED.fullmatch(name)]


def has_progress(output_dir: str | Path) -> bool:
    """Whether the run in `output_dir` would lose something if it started over: a checkpoint, or a model inside that has one or is
    finished."""
    inside = models_inside(output_dir)
    return any(complete_checkpoints(each) or os.path.lexists(each / MANIFEST) for each in inside) or bool(
        complete_checkpoints(output_dir)
    )


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint, by its name; 0 without one."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, which is kept until the stage has finished; returns its new path."""
    aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    if aside.name in owned(aside.parent):
        delete_checkpoint(aside)
    checkpoint.rename(own(aside))
    delete(checkpoint)  # from the record
    return aside


def clear_partial(output_dir: str | Path) -> None:
    """Delete what a killed run wrote in part."""
    for name in owned(output_dir):
        path = Path(output_dir) / name
        if CHECKPOINT_NAME.fullmatch(name) and not (path / COMPLETE).is_file():
            delete_checkpoint(path)
        elif fnmatch(name, ".*.partial"):
            delete(path)


def lost_records(checkpoint: Path) -> dict[str, str]:
    """What is wrong with the run's records up to a checkpoint, by name; what was written later does not count."""
    lost = {}
    for name, (size, crc) in _records(checkpoint).items():
        path = checkpoint.parent / name
        if path.is_symlink() or not path.is_file():
            lost[name] = "is missing"
        elif (actual := path.stat().st_size) < size:
            lost[name] = f"has {actual} bytes, fewer than the {size} that it had at {checkpoint.name}"
        elif fingerprint(path, size) != [size, crc]:
            lost[name] = f"has other lines than it had at {checkpoint.name}"
    return lost


def cut_records(checkpoint: Path) -> None:
    """Cut the run's records to their length at a checkpoint: later steps are done again."""
    recorded = _records(checkpoint)
    for name in (METRICS, SAMPLES):
        size = recorded[name][0] if name in recorded else 0  # begun after the checkpoint
        path = checkpoint.parent / name
        if name in owned(path.parent) and path.is_file() and path.stat().st_size > size:
            with open(path, "rb") as file:
                kept = file.read(size)
            write_bytes(path, kept)  # rather than in place: the file may have a second name elsewhere


def _records(checkpoint: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of the records at a checkpoint, whatever else its `complete.json` names."""
    records = read_state(checkpoint)["records"]
    return {name: records[name] for name in (METRICS, SAMPLES) if isinstance(records.get(name), list)}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `mark_complete` was given, with the records and files that it added.

    Raises:
        BadFile: `complete.json` is damaged.
    """
    return read_record(checkpoint / COMPLETE, COMPLETE_RECORD)
