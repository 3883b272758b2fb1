"""Files that a run did not write in folders that it deletes: they are moved out first."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection
from pathlib import Path

from align.models.inspect_folder import OTHER_FILES, TEXT_FILES
from align.models.small_files import JSON_FILES
from align.terminal import say

TEMPORARY = re.compile(r"\.(.+)\.align-[0-9a-f]{12}", re.ASCII)  # of `align.runs.files.write_bytes`
CHECKPOINT = (
    *("complete.json", "trainer_state.json", "training_args.bin", "README.md", "config.json", "random/*-of-*.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "additional_chat_templates/*.jinja"),
    *(f"{folder}/rank-*.safetensors" for folder in ("state", "policy", "value", "ema", "replay")),
    *(*JSON_FILES, *TEXT_FILES, *OTHER_FILES),
)
# What runs write into folders that their record lists as a whole; other such folders have a name that nobody else gives.
INSIDE = {"checkpoint-*": CHECKPOINT, "damaged-checkpoint-*": CHECKPOINT, "parts": ("[0-9]*.json", "samples.jsonl")}


def preserve_other_files(folder: Path, names: Collection[str] | None = None) -> None:
    """Move what a run did not write out of `folder`, which is about to be deleted, to `kept-...` beside it.

    Args:
        names: paths in it that the run wrote, where that is known; otherwise those that runs write.
    """
    patterns = next((inside for name, inside in INSIDE.items() if fnmatch.fnmatch(folder.name, name)), None)
    if names is None and patterns is None:
        return
    kept = folder.with_name(f"kept-{folder.name}")
    while os.path.lexists(kept):
        kept = kept.with_name(f"{kept.name}-too")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (path.is_symlink() or not path.is_dir()) and not _is_own(name.as_posix(), names, patterns or ()):
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept / name)
            say(f"{path}: was not written by this run; moved to {kept / name}")


def _is_own(name: str, names: Collection[str] | None, patterns: Collection[str]) -> bool:
    *folders, last = name.split("/")
    if temporary := TEMPORARY.fullmatch(last):
        name = "/".join([*folders, temporary[1]])
    if names is not None:
        return name in names
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
