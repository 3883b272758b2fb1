"""The output folder of a run: which folders it may take, and how it takes one and gives it up.

A run takes a folder that does not exist, is empty, or bears the mark of `align`: `run.json`, `stage.json`, or `results.json`
of an evaluation. It holds the folder's lock (`align/runs/lock.py`) until it ends. What in the folder is the run's own is the
matter of `align/runs/own_files.py`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from align.data.split import EmptySplit
from align.errors import OtherRun, UserError
from align.runs import lock, lock_record
from align.runs.files import write_json
from align.runs.others_files import TEMPORARY
from align.runs.own_files import MANIFEST, RUN, check_way, delete, owned, read_mark, remove_empty
from align.runs.run_record import check_rows

RESULTS = "results.json"
PARTS = "parts"  # of an unfinished evaluation: outputs of each finished setting
MARKS = (MANIFEST, RESULTS, RUN)  # the first that is there counts: a run's record may outlive its end by a moment
BEFORE_TRAINING = {"untrained", ".untrained.partial", "wandb", "wandb_run.json"}  # made before the first step

R = TypeVar("R", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Claim:
    """A claimed output folder: the claim of rank 0, or the share of another rank."""

    lock: lock.Held
    is_main: bool
    is_new: bool = False  # no earlier run has left anything in the folder
    made: tuple[Path, ...] = ()  # the folder and its parents, as far as this process made them, innermost first


_claims: dict[tuple[str, int], _Claim] = {}  # by folder and thread


def _key(folder: Path) -> tuple[str, int]:
    return os.path.abspath(folder), threading.get_ident()


def find_mark(output_dir: str | Path) -> tuple[str, dict[str, Any]] | None:
    """The name and content of the record that marks a folder as one of `align`; None for an empty or absent folder.

    Raises:
        UserError: the folder holds something else, or is none.
    """
    folder = Path(output_dir)
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        kind_text = "a link to nothing" if folder.is_symlink() else "a file"
        raise UserError(f"output_dir: cannot write to {folder}, which is {kind_text}; choose another folder.")
    for name in MARKS:
        content = read_mark(folder / name)
        if isinstance(content.get("stage"), str) and isinstance(content.get("recipe"), dict):
            return name, content
    lock_record.read(folder)
    try:
        others = sorted(each.name for each in folder.iterdir() if not _is_start(each.name))
    except OSError as error:
        raise UserError(f"output_dir: cannot read {folder} ({error.strerror}); choose another folder.") from error
    if not others:
        return None
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    raise UserError(
        f"output_dir: {folder} holds {', '.join(others[:3])}{more}, and no stage.json or run.json that says it is the output "
        "of a run; choose an empty or a new folder, or move these elsewhere."
    )


def _is_start(name: str) -> bool:
    """Whether it may be all that a run left that was killed while it claimed the folder."""
    return name == lock_record.LOCK or ((match := TEMPORARY.fullmatch(name)) is not None and match[1] == RUN)


def claim(output_dir: str | Path, identity: Mapping[str, Any], resuming: bool) -> None:
    """Take the output folder for this run, for rank 0: lock it, and write `run.json` unless the run there is resumed.

    Args:
        identity: stage, recipe and inputs.
        resuming: whether the folder is known to hold an unfinished run of this identity.

    Raises:
        UserError: the folder cannot be written, holds something else, is in use, or a file that is not the run's own has a
            name that it needs. Nothing has been written then.
    """
    folder = Path(output_dir)
    _check_unfinished(folder, identity["stage"])
    made = tuple(each for each in (folder, *folder.parents) if not os.path.lexists(each))
    held = None
    try:
        held = lock.acquire(folder)
        found = _check_unfinished(folder, identity["stage"])  # again: from here on nobody else writes there
        files = owned(folder)
        check_way(folder, files)
        _clear_temporary(folder, files)
        if not (found and resuming):
            write_json(folder / RUN, {**identity, "files": sorted(files)})
    except BaseException as error:
        if held is not None:
            lock.release(held, delete=True)
        remove_empty(made)
        if isinstance(error, OSError):
            raise UserError(
                f"output_dir: cannot write to {folder} ({error.strerror}); choose another folder."
            ) from error
        raise
    _claims[_key(folder)] = _Claim(held, is_main=True, is_new=not found, made=made)


def share(output_dir: str | Path) -> None:
    """Hold the folder that rank 0 has claimed, on another rank.

    Raises:
        UserError: another run has taken it.
    """
    if (held := lock.share(Path(output_dir))) is not None:
        _claims[_key(Path(output_dir))] = _Claim(held, is_main=False)


def _check_unfinished(folder: Path, stage: str) -> dict[str, Any]:
    """The record of the unfinished run in the folder; empty if there is none."""
    if (mark := find_mark(folder)) is None:
        return {}
    name, content = mark
    if name != RUN or content["stage"] != stage:
        kind = "an unfinished" if name == RUN else "a finished"
        raise OtherRun(
            f"output_dir: {folder} holds {kind} run of the {content['stage']} stage; choose another folder, or delete this one."
        )
    if "files" not in content and any(folder.glob("checkpoint-*/complete.json")):
        raise UserError(
            f"output_dir: {folder} holds a run that an earlier version of align began, whose checkpoints are pickles, which this "
            "one does not load; finish it with that version, or delete the folder to start over."
        )
    return content


def _clear_temporary(folder: Path, files: set[str]) -> None:
    """Delete what a run that was killed within `write_bytes` left beside its files."""
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and match[1] in {RUN, MANIFEST, *files} and path.is_file() and not path.is_symlink():
            path.unlink()


def clear_finished(output_dir: str | Path) -> None:
    """Delete what a run has left that was killed after it had finished, and before it gave up its folder. For rank 0."""
    folder = Path(output_dir)
    if not any(os.path.lexists(folder / name) for name in (RUN, lock_record.LOCK)):
        return
    with contextlib.suppress(OSError, UserError):  # in use, or to be read only
        held = lock.acquire(folder, wait=False)
        try:
            _clear_temporary(folder, owned(folder))
            if "stage" in read_mark(folder / RUN):
                delete(folder / PARTS)
                (folder / RUN).unlink()
        finally:
            lock.release(held, delete=True)


def one_run_per_folder(run: R) -> R:
    """Decorate a stage's `run(recipe)`: it gives up what it has claimed at its end.

    A run that ends with an error before its first step leaves no trace in a folder that was new to it.
    """

    @functools.wraps(run)
    def releasing(recipe: Any) -> Any:
        folder = Path(recipe.output_dir)
        if _key(folder) in _claims:  # a run within a run, which will be refused
            return run(recipe)
        try:
            return run(recipe)
        except BaseException as error:
            if isinstance(error, EmptySplit) and error.report is not None:
                check_rows(recipe, error.report)
            with contextlib.suppress(OSError, UserError):
                _withdraw(folder)
            raise
        finally:
            release(folder)

    return cast(R, releasing)


def release(folder: Path) -> None:
    """Release the folder that this process has claimed or shares, if any."""
    if (claimed := _claims.pop(_key(folder), None)) is not None:
        lock.release(claimed.lock, delete=claimed.is_main)


def _withdraw(folder: Path) -> None:
    claimed = _claims.get(_key(folder))
    if claimed is None or not claimed.is_new:
        return
    names = {name.partition("/")[0] for name in owned(folder)}
    if any(name not in BEFORE_TRAINING and not _is_empty(folder / name) for name in names):
        return
    for name in names:
        delete(folder / name)
    (folder / RUN).unlink(missing_ok=True)
    release(folder)
    remove_empty(claimed.made)


def _is_empty(path: Path) -> bool:
    if path.is_dir():
        return next(path.iterdir(), None) is None
    return not path.exists() or path.stat().st_size == 0
