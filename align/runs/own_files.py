"""Which files of an output folder belong to the run: no others are overwritten, deleted, or written to through a link.

`run.json` lists it under `files`, and so does `stage.json` once the run has finished. An entry `best/config.json` is one file,
and `checkpoint-4` a file or folder with everything in it. All functions are for rank 0.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from align.config.json_file import parse_json, read_file
from align.errors import BadFile, UserError
from align.runs.files import follow_umask, sync_all, write_json
from align.runs.others_files import preserve_other_files
from align.runs.records import is_inner_path

MANIFEST = "stage.json"
RUN = "run.json"
IN_THE_WAY = """
run.json stage.json metrics.jsonl samples.jsonl wandb_run.json wandb README.md losses.svg checkpoint-* damaged-checkpoint-*
untrained best value ema adapter bad_batches .untrained.partial .model.partial .best.partial .value.partial .ema.partial
model*.safetensors* adapter_* config.json generation_config.json tokenizer*.json chat_template.jinja
parts predictions.jsonl results.md results.json
member_* judge card card.md confident_errors.jsonl reliability.svg margins.svg .card.partial
best.jsonl random.jsonl pairs.jsonl responses.jsonl frontier.svg vllm_weights
"""  # names that runs write


def read_mark(path: Path) -> dict[str, Any]:
    """The mapping in a record of a run; empty where there is none, it is damaged, or a link is in its place."""
    try:
        raw = read_file(path, follow_links=False)
        parse_json(raw, path, nan_as_null=True)
    except BadFile:
        return {}
    found = json.loads(raw)  # as it was written, NaN included
    return found if isinstance(found, dict) else {}


def in_the_way(path: Path, *others: Path) -> UserError:
    """The error for files or folders that have names that the run needs."""
    what = (
        "is a symbolic link, through which nothing is written" if path.is_symlink() else "was not written by this run"
    )
    so = ""
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        so = f" (so have {', '.join(other.name for other in others[:3])}{more})"
    return UserError(
        f"output_dir: {path} {what}, and has a name that the run needs{so}; move {'them' if so else 'it'} elsewhere and start "
        "again."
    )


def check_way(folder: Path, files: set[str]) -> None:
    """Check that names which a run writes are free, or that of a file of its own.

    Args:
        files: what is the run's own.

    Raises:
        UserError: a file of others has one, or there is a link in place of a file of the run.
    """
    mine = {name.partition("/")[0] for name in files} | ({RUN} if read_mark(folder / RUN) else set())
    found = [
        entry
        for entry in sorted(folder.iterdir())
        if (
            entry.is_symlink()
            if entry.name in mine
            else any(fnmatch.fnmatch(entry.name, each) for each in IN_THE_WAY.split())
        )
    ]
    if found:
        raise in_the_way(*found)


def remove_empty(folders: Iterable[Path]) -> None:
    """Delete those of `folders` that are empty, one after the other."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def owned(folder: str | Path) -> set[str]:
    """The files that the run's record in an output folder lists, by relative path.

    Raises:
        UserError: it lists something outside the folder.
    """
    record = read_mark(Path(folder) / RUN) or read_mark(Path(folder) / MANIFEST)
    files = record.get("files", [])
    if not isinstance(files, list) or not all(map(is_inner_path, files)):
        raise UserError(f"{folder}: `files` in its {RUN} or {MANIFEST} is damaged; restore it, or delete the folder.")
    return set(files)


def own(*paths: Path) -> Path:
    """Record entries of one output folder as the run's own, which it is about to write; returns the first.

    Raises:
        UserError: one is there already and is not the run's own, or is a symbolic link.
    """
    folder = paths[0].parent
    files = owned(folder)
    new = {path.name for path in paths if not _names(files, path.name)}
    for path in paths:
        if path.is_symlink() or (path.name in new and os.path.lexists(path)):
            raise in_the_way(path)
    if new:
        _record(folder, files | new)
    return paths[0]


def _names(files: set[str], name: str) -> set[str]:
    """The entries of the record for a file or folder and what is in it."""
    return {file for file in files if file == name or file.startswith(f"{name}/")}


def _record(folder: Path, files: set[str]) -> None:
    if not (record := read_mark(folder / RUN)):
        raise UserError(
            f"{folder / RUN}: was removed or damaged while the stage ran, so that it does not know its own files any more; start "
            "the stage again."
        )
    write_json(folder / RUN, {**record, "files": sorted(files)})


def delete(path: Path, inside: Collection[str] | None = None) -> None:
    """Delete a file or folder of an output folder, as far as the run's record lists it; files of others stay.

    Args:
        inside: what the run wrote into a folder that is listed as a whole, where that is known.
    """
    folder, files = path.parent, owned(path.parent)
    mine = _names(files, path.name)
    if not mine:
        return
    if not path.is_symlink():
        if path.name in mine and path.is_dir():
            preserve_other_files(path, inside)
            shutil.rmtree(path, ignore_errors=True)
        else:
            for name in mine:
                if not any(parent.is_symlink() for parent in (folder / name).parents if folder in parent.parents):
                    (folder / name).unlink(missing_ok=True)
            remove_empty(sorted((each for each in path.rglob("*") if each.is_dir()), reverse=True))
            remove_empty([path])
    _record(folder, files - mine)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` in an output folder after the block without an error.

    It replaces what the run has written there before; files that others have put into it stay.

    Raises:
        UserError: a file or folder of that name is not the run's own.
    """
    temporary = _start_partial(path)
    yield temporary
    _settle(temporary)
    _put_folder(temporary, path)


@contextlib.contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files and folders move into the output folder `folder` after the block without an error.

    Raises:
        UserError: a file or folder of one of these names is not the run's own.
    """
    temporary = _start_partial(folder / "model")
    yield temporary
    _settle(temporary)
    entries = sorted(temporary.iterdir())
    if files := [folder / entry.name for entry in entries if not entry.is_dir()]:
        own(*files)
    for entry in entries:
        if entry.is_dir():
            _put_folder(entry, folder / entry.name)
        else:
            os.replace(entry, folder / entry.name)
    delete(temporary)


def _settle(folder: Path) -> None:
    """Files that are whole on the disk before they get their names, so that a crash of the machine leaves no half of one."""
    follow_umask(folder.rglob("*.safetensors"))
    sync_all(path for path in folder.rglob("*") if path.is_file())


def new_files_in(folder: Path) -> Path:
    """The folder that `new_files(folder)` yields, for ranks other than 0."""
    return _partial(folder / "model")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _start_partial(path: Path) -> Path:
    if path.is_symlink() or (os.path.lexists(path) and not _names(owned(path.parent), path.name)):
        raise in_the_way(path)
    temporary = _partial(path)
    delete(temporary)
    own(temporary).mkdir()
    return temporary


def _put_folder(source: Path, path: Path) -> None:
    """Move a folder that the run has written to `path` in the output folder, in place of what it has written there before."""
    folder, files = path.parent, owned(path.parent)
    retired = _retired(path)
    fresh = {f"{path.name}/{name}" for name in _files_in(source)}
    old = _names(files, path.name)
    others: set[str] = set()
    if os.path.lexists(path):
        if path.is_symlink() or not old:
            raise in_the_way(path)
        inside = {f"{path.name}/{name}" for name in _files_in(path)}
        others = set() if path.name in old else inside - old
        if both := sorted(others & fresh):
            raise in_the_way(folder / both[0])
        delete(retired)
        if retired.exists():  # with files of others, from a run that was killed at this point
            raise in_the_way(retired)
        old = inside - others
        _record(folder, owned(folder) | fresh | {f"{retired.name}{name.removeprefix(path.name)}" for name in old})
        os.replace(path, retired)
    else:
        _record(folder, files | fresh)
    os.replace(source, path)
    for name in others:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(retired / Path(name).relative_to(path.name), target)
    delete(retired)
    kept = owned(folder) - _names(owned(folder), path.name) - _names(owned(folder), source.name)
    _record(folder, kept | fresh)


def put_back(path: Path) -> None:
    """Give a folder its name again, if a run was killed while it put another one in its place."""
    if not os.path.lexists(path) and _names(owned(path.parent), _retired(path).name) and _retired(path).is_dir():
        os.replace(_retired(path), path)


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.retired")


def _files_in(folder: Path) -> set[str]:
    return {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_symlink() or not each.is_dir()}
